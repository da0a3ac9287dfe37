"""Core ML packages of the layer and of whole networks: written, checked and evaluated anywhere.

Apple's coremltools, the extra `[coreml]`, is imported when a package is first written or read.
`python -m torch_bridge.coreml` is the command line, and `docs/coreml.md` the guide.
"""
