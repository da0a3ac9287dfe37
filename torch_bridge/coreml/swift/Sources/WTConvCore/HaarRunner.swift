/// Haar cascades, of any number of levels and any sizes.
///
/// Bands of a level are `[N, 4 * C, h, w]`: channel `4 * c + s` is subband s of channel c, in the
/// order LL, LH, HL, HH (high along no axis, along H, along W, along both), and sizes are half of
/// those above, rounded up. Odd sizes are padded with zeros at the bottom and right.
public protocol HaarRunner {
  /// The bands of each level, finest first; the low band LL of each is the next level's input.
  func forward(_ image: Tensor, levels: Int) throws -> [Tensor]

  /// The image `[N, C, height, width]` that has these bands: the inverse of `forward`.
  ///
  /// Low bands of all levels but the last are not read, because the levels below determine them.
  func inverse(_ bands: [Tensor], height: Int, width: Int) throws -> Tensor
}

extension HaarRunner {
  /// The sum of all levels' images `[N, C, height, width]`, which a wavelet convolution ends with.
  ///
  /// Unlike `inverse` it reads every low band: each is added to what the levels below give.
  public func synthesis(_ bands: [Tensor], height: Int, width: Int) throws -> Tensor {
    let sizes = try checkBands(bands, height: height, width: width)
    var below: Tensor?
    for level in bands.indices.reversed() {
      var all = bands[level]
      if let below { all.addToLowBands(below) }
      below = try inverse([all], height: sizes[level].height, width: sizes[level].width)
    }
    guard let image = below else { throw WTConvError.shape("there are no bands") }
    return image
  }
}

/// Sizes of the image and of the bands of each level; throws where they cannot be.
@discardableResult
func cascadeSizes(height: Int, width: Int, levels: Int) throws -> [(height: Int, width: Int)] {
  guard levels >= 0 else { throw WTConvError.shape("levels is \(levels), expected at least 0") }
  guard height > 0, width > 0 else {
    throw WTConvError.shape("the image has sizes \(height) x \(width), expected at least 1")
  }
  var sizes = [(height: height, width: width)]
  for level in 0..<levels {
    sizes.append(((sizes[level].height + 1) / 2, (sizes[level].width + 1) / 2))
  }
  return sizes
}

/// Throws where bands do not fit each other or the size; returns sizes as `cascadeSizes` does.
func checkBands(
  _ bands: [Tensor], height: Int, width: Int
) throws -> [(height: Int, width: Int)] {
  let sizes = try cascadeSizes(height: height, width: width, levels: bands.count)
  guard let first = try bands.first?.sizes("bands of level 1") else {
    throw WTConvError.shape("there are no bands, expected those of at least one level")
  }
  for (level, (band, size)) in zip(bands, sizes.dropFirst()).enumerated() {
    let expected = [first.images, first.channels, size.height, size.width]
    guard first.channels % 4 == 0, band.shape == expected else {
      throw WTConvError.shape(
        "bands of level \(level + 1) have shape \(band.shape), expected \(expected) with a "
          + "multiple of 4 channels, for an image of \(height) x \(width)")
    }
  }
  return sizes
}

extension Tensor {
  /// Of bands `[N, 4 * C, h, w]` the low bands `[N, C, h, w]`.
  func lowBands() throws -> Tensor {
    let sizes = try sizes("bands")
    let plane = sizes.plane
    var low = [Float]()
    low.reserveCapacity(values.count / 4)
    for start in Swift.stride(from: 0, to: values.count, by: 4 * plane) {
      low += values[start..<(start + plane)]
    }
    return try Tensor(
      shape: [sizes.images, sizes.channels / 4, sizes.height, sizes.width], values: low)
  }

  /// Adds an image `[N, C, h, w]` to the low bands of these bands `[N, 4 * C, h, w]`.
  fileprivate mutating func addToLowBands(_ image: Tensor) {
    let plane = shape[2] * shape[3]
    for p in 0..<(shape[0] * shape[1] / 4) {
      for i in 0..<plane { values[4 * p * plane + i] += image.values[p * plane + i] }
    }
  }
}
