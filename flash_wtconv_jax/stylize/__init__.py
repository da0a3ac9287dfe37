"""Fast style transfer of picture files: `flash-wtconv stylize`."""
