/// A wavelet convolution: Haar transforms, convolutions between them, and the base branch.
public struct WTConvLayer {
  /// How long each stage of a call took.
  public struct Times: Sendable {
    public var haar = Duration.zero
    public var convolutions = Duration.zero
    public var inverse = Duration.zero
    public var sum = Duration.zero

    public init() {}
  }

  public let haar: any HaarRunner
  public let convolutions: any ConvolutionRunner
  public let levels: Int

  public init(haar: any HaarRunner, convolutions: any ConvolutionRunner, levels: Int) {
    self.haar = haar
    self.convolutions = convolutions
    self.levels = levels
  }

  /// The output `[1, C, H, W]` of an image of that shape.
  public func callAsFunction(_ image: Tensor) throws -> Tensor {
    var times = Times()
    return try callAsFunction(image, times: &times)
  }

  /// The output of an image, and how long each stage took.
  public func callAsFunction(_ image: Tensor, times: inout Times) throws -> Tensor {
    let size = try image.sizes("image")
    let clock = ContinuousClock()
    var bands: [Tensor] = []
    times.haar = try clock.measure { bands = try haar.forward(image, levels: levels) }
    var (output, filtered) = (image, bands)
    times.convolutions = try clock.measure {
      (output, filtered) = try convolutions.convolve(image, bands: bands)
    }
    guard levels > 0 else { return output }
    var inverse = image
    times.inverse = try clock.measure {
      inverse = try haar.synthesis(filtered, height: size.height, width: size.width)
    }
    times.sum = try clock.measure { try output.add(inverse) }
    return output
  }
}
