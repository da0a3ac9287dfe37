#if canImport(Metal) && canImport(CoreML)
import Foundation
import Metal

/// Haar cascades by the kernels of `wtconv.metal`, up to five levels a launch.
public final class MetalHaarRunner: HaarRunner {
  /// Levels of a launch, and threads along a side of a threadgroup; both are the source's.
  private static let mostLevels = 5
  private static let side = 16

  private let device: any MTLDevice
  private let queue: any MTLCommandQueue
  private let analysis, lowBands, synthesis: any MTLComputePipelineState

  /// Compiles the source that this package bundles, for a device.
  ///
  /// Throws `WTConvError.unavailable` where there is no Metal device or it takes no kernel of this
  /// size, and `WTConvError.failed` where the source does not compile.
  public init(device: (any MTLDevice)? = MTLCreateSystemDefaultDevice()) throws {
    guard let device, let queue = device.makeCommandQueue() else {
      throw WTConvError.unavailable("this machine has no Metal device; use the backend cpu")
    }
    let library: any MTLLibrary
    do {
      library = try device.makeLibrary(source: Self.source(), options: nil)
    } catch let error as WTConvError {
      throw error
    } catch {
      throw WTConvError.failed("wtconv.metal does not compile: \(error.localizedDescription)")
    }
    func pipeline(_ name: String) throws -> any MTLComputePipelineState {
      guard let function = library.makeFunction(name: name) else {
        throw WTConvError.failed("wtconv.metal has no kernel \(name)")
      }
      let state: any MTLComputePipelineState
      do {
        state = try device.makeComputePipelineState(function: function)
      } catch {
        throw WTConvError.failed("kernel \(name) does not compile: \(error.localizedDescription)")
      }
      let threads = Self.side * Self.side
      guard state.maxTotalThreadsPerThreadgroup >= threads else {
        throw WTConvError.unavailable(
          "kernel \(name) needs \(threads) threads a threadgroup, \(device.name) allows "
            + "\(state.maxTotalThreadsPerThreadgroup)")
      }
      return state
    }
    self.device = device
    self.queue = queue
    analysis = try pipeline("analysis_float32")
    lowBands = try pipeline("low_bands_float32")
    synthesis = try pipeline("synthesis_float32")
  }

  /// The Metal source in the package's bundle.
  static func source() throws -> String {
    guard let url = Bundle.module.url(forResource: "wtconv", withExtension: "metal") else {
      throw WTConvError.unavailable("wtconv.metal is missing in \(Bundle.module.bundlePath)")
    }
    do {
      return try String(contentsOf: url, encoding: .utf8)
    } catch {
      throw WTConvError.file("cannot read \(url.path): \(error.localizedDescription)")
    }
  }

  public func forward(_ image: Tensor, levels: Int) throws -> [Tensor] {
    let size = try image.sizes("image")
    try cascadeSizes(height: size.height, width: size.width, levels: levels)
    var found: [Tensor] = []
    var image = image
    while found.count < levels {
      if let last = found.last { image = try last.lowBands() }
      found += try analysed(image, levels: min(Self.mostLevels, levels - found.count))
    }
    return found
  }

  public func inverse(_ bands: [Tensor], height: Int, width: Int) throws -> Tensor {
    let sizes = try checkBands(bands, height: height, width: width)
    var low = try bands[bands.count - 1].lowBands()
    var deepest = bands.count
    while deepest > 0 {
      let first = max(0, deepest - Self.mostLevels)
      let (rows, columns) = sizes[first]
      low = try synthesised(bands[first..<deepest], low: low, height: rows, width: columns)
      deepest = first
    }
    return low
  }

  /// The bands of one to five levels. One kernel finds the high ones, another the low ones.
  private func analysed(_ image: Tensor, levels: Int) throws -> [Tensor] {
    let size = try image.sizes("image")
    let sizes = try cascadeSizes(height: size.height, width: size.width, levels: levels)
    let planes = size.planes
    let counts = sizes.dropFirst().map { planes * $0.height * $0.width }
    let pixels = try buffer(image.values)
    let high = try counts.map { try buffer(count: 3 * $0) }
    let low = try counts.map { try buffer(count: $0) }
    try run { encoder in
      try launch(analysis, encoder, image: pixels, size, levels: high, low: low[levels - 1])
      if levels > 1 {
        let above = Array(low.dropLast())
        try launch(lowBands, encoder, image: pixels, size, levels: above, low: above[levels - 2])
      }
    }
    return try (0..<levels).map { level in
      let (rows, columns) = sizes[level + 1]
      let plane = rows * columns
      var bands = try Tensor(zeros: [size.images, 4 * size.channels, rows, columns])
      let (lows, highs) = (Self.floats(low[level]), Self.floats(high[level]))
      bands.values.withUnsafeMutableBufferPointer { values in
        guard let target = values.baseAddress else { return }
        for p in 0..<planes {
          (target + 4 * p * plane).update(from: lows + p * plane, count: plane)
          (target + (4 * p + 1) * plane).update(from: highs + 3 * p * plane, count: 3 * plane)
        }
      }
      return bands
    }
  }

  /// The image of one to five levels' bands, the low bands of the last given apart.
  private func synthesised(
    _ bands: ArraySlice<Tensor>, low: Tensor, height: Int, width: Int
  ) throws -> Tensor {
    let deepest = try low.sizes("low bands")
    let size = Tensor.Sizes(
      images: deepest.images, channels: deepest.channels, height: height, width: width)
    var image = try Tensor(zeros: [size.images, size.channels, height, width])
    let lowest = try buffer(low.values)
    let high = try bands.map { level -> any MTLBuffer in
      let plane = level.shape[2] * level.shape[3]
      let details = try buffer(count: level.values.count / 4 * 3)
      let target = Self.floats(details)
      level.values.withUnsafeBufferPointer { values in
        guard let source = values.baseAddress else { return }
        for p in 0..<size.planes {
          (target + 3 * p * plane).update(from: source + (4 * p + 1) * plane, count: 3 * plane)
        }
      }
      return details
    }
    let pixels = try buffer(count: image.values.count)
    try run { encoder in
      try launch(synthesis, encoder, image: pixels, size, levels: high, low: lowest)
    }
    image.values.withUnsafeMutableBufferPointer { values in
      values.baseAddress?.update(from: Self.floats(pixels), count: values.count)
    }
    return image
  }

  /// Encodes kernels, runs them and waits.
  private func run(_ encode: (any MTLComputeCommandEncoder) throws -> Void) throws {
    guard let commands = queue.makeCommandBuffer(),
      let encoder = commands.makeComputeCommandEncoder()
    else { throw WTConvError.failed("\(device.name) makes no command buffer") }
    do {
      // An encoder must end before it goes, whatever happens.
      defer { encoder.endEncoding() }
      try encode(encoder)
    }
    commands.commit()
    commands.waitUntilCompleted()
    if let error = commands.error {
      throw WTConvError.failed("\(device.name) failed: \(error.localizedDescription)")
    }
  }

  /// Encodes a kernel: all of them take an image, bands of five levels, the last low band, sizes.
  private func launch(
    _ kernel: any MTLComputePipelineState, _ encoder: any MTLComputeCommandEncoder,
    image: any MTLBuffer, _ size: Tensor.Sizes, levels: [any MTLBuffer], low: any MTLBuffer
  ) throws {
    guard size.plane <= Int(Int32.max), size.planes <= Int(UInt32.max) else {
      throw WTConvError.shape(
        "images of \(size.height) x \(size.width) are too large for wtconv.metal, whose offsets "
          + "are 32-bit numbers; use the backend cpu")
    }
    encoder.setComputePipelineState(kernel)
    // Kernels do not touch the levels that are not there, but each wants its buffer.
    let absent = Array(repeating: low, count: Self.mostLevels - levels.count)
    let buffers = [image] + levels + absent + [low]
    for (index, buffer) in buffers.enumerated() {
      encoder.setBuffer(buffer, offset: 0, index: index)
    }
    // The source's struct Cascade: sizes, the number of levels, the image's strides.
    let numbers = [
      size.channels, size.height, size.width, levels.count,
      size.channels * size.plane, size.plane, size.width, 1,
    ].map(Int64.init)
    numbers.withUnsafeBytes { bytes in
      guard let start = bytes.baseAddress else { return }
      encoder.setBytes(start, length: bytes.count, index: buffers.count)
    }
    // A thread computes a block of 2 x 2 pixels.
    let pixels = 2 * Self.side
    encoder.dispatchThreadgroups(
      MTLSize(
        width: (size.width + pixels - 1) / pixels, height: (size.height + pixels - 1) / pixels,
        depth: size.planes),
      threadsPerThreadgroup: MTLSize(width: Self.side, height: Self.side, depth: 1))
  }

  private func buffer(count: Int) throws -> any MTLBuffer {
    let length = count * MemoryLayout<Float>.size
    guard let buffer = device.makeBuffer(length: length, options: .storageModeShared) else {
      throw WTConvError.failed("\(device.name) has no \(length) bytes of memory for a buffer")
    }
    return buffer
  }

  private func buffer(_ values: [Float]) throws -> any MTLBuffer {
    let buffer = try buffer(count: values.count)
    values.withUnsafeBufferPointer { source in
      guard let start = source.baseAddress else { return }
      Self.floats(buffer).update(from: start, count: source.count)
    }
    return buffer
  }

  private static func floats(_ buffer: any MTLBuffer) -> UnsafeMutablePointer<Float> {
    buffer.contents().assumingMemoryBound(to: Float.self)
  }
}
#endif
