/// The depthwise convolutions of a layer, with scales and bias, between its Haar transforms.
public protocol ConvolutionRunner {
  /// The base branch of an image `[1, C, H, W]`, and the filtered bands of each level.
  ///
  /// Bands are those of `HaarRunner.forward`; shapes stay.
  func convolve(_ image: Tensor, bands: [Tensor]) throws -> (base: Tensor, filtered: [Tensor])
}

/// The convolutions in plain Swift, for any machine; `WTConvPackage.convolutions` makes them.
public struct CPUConvolutionRunner: ConvolutionRunner {
  /// The taps of one convolution, `[C, 1, k, k]`, and its bias if there is one.
  public struct Depthwise: Sendable {
    public let taps: Tensor
    public let bias: [Float]?

    /// Throws `WTConvError.shape` for taps or a bias of another shape.
    public init(taps: Tensor, bias: [Float]? = nil) throws {
      let shape = taps.shape
      guard shape.count == 4, shape[1] == 1, shape[2] == shape[3] else {
        throw WTConvError.shape("taps have shape \(shape), expected [C, 1, k, k]")
      }
      guard bias == nil || bias?.count == shape[0] else {
        throw WTConvError.shape("the bias has \(bias?.count ?? 0) values, expected \(shape[0])")
      }
      self.taps = taps
      self.bias = bias
    }
  }

  public let base: Depthwise
  /// The convolution of the bands of each level, finest first.
  public let levels: [Depthwise]

  public init(base: Depthwise, levels: [Depthwise]) {
    self.base = base
    self.levels = levels
  }

  public func convolve(
    _ image: Tensor, bands: [Tensor]
  ) throws -> (base: Tensor, filtered: [Tensor]) {
    guard bands.count == levels.count else {
      throw WTConvError.shape(
        "there are bands of \(bands.count) levels, the model has \(levels.count)")
    }
    return (try base(image), try zip(levels, bands).map { try $0($1) })
  }
}

extension CPUConvolutionRunner.Depthwise {
  /// The convolution of `[N, C, H, W]`, of the same shape: zeros outside, even k pads less before.
  func callAsFunction(_ image: Tensor) throws -> Tensor {
    let size = try image.sizes("image")
    let k = taps.shape[2]
    guard size.channels == taps.shape[0] else {
      throw WTConvError.shape(
        "the image has \(size.channels) channels, the model has \(taps.shape[0])")
    }
    var sums = try Tensor(zeros: image.shape)
    let (height, width, before) = (size.height, size.width, (k - 1) / 2)
    image.values.withUnsafeBufferPointer { pixels in
      sums.values.withUnsafeMutableBufferPointer { sums in
        for p in 0..<size.planes {
          let channel = p % size.channels
          if let bias {
            for i in 0..<size.plane { sums[p * size.plane + i] = bias[channel] }
          }
          for i in 0..<k {
            let rows = inside(height, shift: i - before)
            for j in 0..<k {
              let columns = inside(width, shift: j - before)
              let tap = taps.values[(channel * k + i) * k + j]
              for row in rows {
                let to = p * size.plane + row * width
                let from = to + (i - before) * width + (j - before)
                for column in columns { sums[to + column] += tap * pixels[from + column] }
              }
            }
          }
        }
      }
    }
    return sums
  }

  /// The places along an axis from which one shifted by so many lies inside too.
  private func inside(_ size: Int, shift: Int) -> Range<Int> {
    let first = max(0, -shift)
    return first..<max(first, min(size, size - shift))
  }
}
