/// Haar cascades in plain Swift, for any machine.
public struct CPUHaarRunner: HaarRunner {
  public init() {}

  public func forward(_ image: Tensor, levels: Int) throws -> [Tensor] {
    let size = try image.sizes("image")
    try cascadeSizes(height: size.height, width: size.width, levels: levels)
    var found: [Tensor] = []
    var image = image
    for level in 0..<levels {
      if level > 0 { image = try found[level - 1].lowBands() }
      found.append(try analysed(image))
    }
    return found
  }

  public func inverse(_ bands: [Tensor], height: Int, width: Int) throws -> Tensor {
    let sizes = try checkBands(bands, height: height, width: width)
    var low = try bands[bands.count - 1].lowBands()
    for level in bands.indices.reversed() {
      let (rows, columns) = sizes[level]
      low = try synthesised(bands[level], low: low, height: rows, width: columns)
    }
    return low
  }

  /// One level's bands of an image.
  private func analysed(_ image: Tensor) throws -> Tensor {
    let size = try image.sizes("image")
    let (rows, columns) = ((size.height + 1) / 2, (size.width + 1) / 2)
    var bands = try Tensor(zeros: [size.images, 4 * size.channels, rows, columns])
    let plane = rows * columns
    image.values.withUnsafeBufferPointer { pixels in
      bands.values.withUnsafeMutableBufferPointer { bands in
        for p in 0..<size.planes {
          for row in 0..<rows {
            for column in 0..<columns {
              let at = p * size.plane + 2 * row * size.width + 2 * column
              let below = 2 * row + 1 < size.height
              let right = 2 * column + 1 < size.width
              let a = pixels[at]
              let b = right ? pixels[at + 1] : 0
              let c = below ? pixels[at + size.width] : 0
              let d = below && right ? pixels[at + size.width + 1] : 0
              let to = 4 * p * plane + row * columns + column
              bands[to] = 0.5 * ((a + b) + (c + d))
              bands[to + plane] = 0.5 * ((a + b) - (c + d))
              bands[to + 2 * plane] = 0.5 * ((a - b) + (c - d))
              bands[to + 3 * plane] = 0.5 * ((a - b) - (c - d))
            }
          }
        }
      }
    }
    return bands
  }

  /// The image of one level's bands, whose low bands are given apart.
  private func synthesised(
    _ bands: Tensor, low: Tensor, height: Int, width: Int
  ) throws -> Tensor {
    let size = try low.sizes("low bands")
    let plane = size.plane
    var image = try Tensor(zeros: [size.images, size.channels, height, width])
    low.values.withUnsafeBufferPointer { low in
      bands.values.withUnsafeBufferPointer { bands in
        image.values.withUnsafeMutableBufferPointer { pixels in
          for p in 0..<size.planes {
            for row in 0..<height {
              for column in 0..<width {
                let at = row / 2 * size.width + column / 2
                let from = 4 * p * plane + at
                let sy: Float = row % 2 == 0 ? 1 : -1
                let sx: Float = column % 2 == 0 ? 1 : -1
                let even = low[p * plane + at] + sy * bands[from + plane]
                let odd = bands[from + 2 * plane] + sy * bands[from + 3 * plane]
                pixels[(p * height + row) * width + column] = 0.5 * (even + sx * odd)
              }
            }
          }
        }
      }
    }
    return image
  }
}
