import Foundation

/// Float32 numbers in row-major order; images are `[N, C, H, W]`.
public struct Tensor: Equatable, Sendable {
  public let shape: [Int]
  public var values: [Float]

  /// Throws `WTConvError.shape` if a size is less than 1 or there are more or fewer values.
  public init(shape: [Int], values: [Float]) throws {
    let expected = try Tensor.count(of: shape)
    guard values.count == expected else {
      throw WTConvError.shape(
        "shape \(shape) has \(expected) values, got \(values.count)")
    }
    self.shape = shape
    self.values = values
  }

  /// A tensor of zeros.
  public init(zeros shape: [Int]) throws {
    try self.init(shape: shape, values: [Float](repeating: 0, count: Tensor.count(of: shape)))
  }

  /// The number of values of a shape; throws where a size is less than 1 or memory has no such size.
  public static func count(of shape: [Int]) throws -> Int {
    var bytes = MemoryLayout<Float>.size
    for size in shape {
      guard size > 0 else {
        throw WTConvError.shape("shape \(shape) has a size of \(size), expected at least 1")
      }
      let (product, overflow) = bytes.multipliedReportingOverflow(by: size)
      guard !overflow else {
        throw WTConvError.shape("shape \(shape) has more values than memory can hold")
      }
      bytes = product
    }
    return bytes / MemoryLayout<Float>.size
  }

  /// Sizes of an image or of bands.
  struct Sizes {
    let images, channels, height, width: Int
    var planes: Int { images * channels }
    var plane: Int { height * width }
  }

  /// The four sizes of `[N, C, H, W]`; throws for another rank.
  func sizes(_ name: String) throws -> Sizes {
    guard shape.count == 4 else {
      throw WTConvError.shape("\(name) has shape \(shape), expected [N, C, H, W]")
    }
    return Sizes(images: shape[0], channels: shape[1], height: shape[2], width: shape[3])
  }

  /// Adds a tensor of the same shape.
  public mutating func add(_ other: Tensor) throws {
    guard shape == other.shape else {
      throw WTConvError.shape("cannot add shape \(other.shape) to shape \(shape)")
    }
    values.withUnsafeMutableBufferPointer { sums in
      other.values.withUnsafeBufferPointer { addends in
        for i in sums.indices { sums[i] += addends[i] }
      }
    }
  }
}

// MARK: - Raw files

extension Tensor {
  /// Reads a raw file: little-endian float32 numbers in row-major order and nothing else.
  public init(rawFile path: String, shape: [Int]) throws {
    let count = try Tensor.count(of: shape)
    guard let data = FileManager.default.contents(atPath: path) else {
      throw WTConvError.file("cannot read \(path): there is no such file, or it may not be read")
    }
    guard data.count == 4 * count else {
      let sizes = shape.map(String.init).joined(separator: " x ")
      throw WTConvError.file(
        "\(path) has \(data.count) bytes, expected \(4 * count): \(sizes) float32 numbers")
    }
    try self.init(shape: shape, values: [Float](littleEndian: data))
  }

  /// Writes a raw file, whole or not at all; it replaces one that is there.
  public func write(rawFile path: String) throws {
    do {
      try rawBytes.write(to: URL(fileURLWithPath: path), options: .atomic)
    } catch {
      throw WTConvError.file("cannot write \(path): \(error.localizedDescription)")
    }
  }

  /// The contents of a raw file.
  var rawBytes: Data {
    values.map { $0.bitPattern.littleEndian }.withUnsafeBytes { Data($0) }
  }

  /// The image `[1, C, H, W]` that Python's `torch_bridge.coreml.inputs.formula` makes too.
  ///
  /// Numbers are in [-1, 1) and multiples of 2^-23, so that float32 holds them exactly.
  public static func formula(channels: Int, height: Int, width: Int) throws -> Tensor {
    let shape = [1, channels, height, width]
    let values = (0..<(try count(of: shape))).map { i -> Float in
      let bits = UInt32(truncatingIfNeeded: i) &* 2_654_435_761 &+ 12345
      return Float(bits >> 8) / 8_388_608 - 1
    }
    return try Tensor(shape: shape, values: values)
  }
}

extension [Float] {
  /// Numbers of little-endian bytes, whose number is a multiple of four.
  init(littleEndian bytes: some ContiguousBytes) {
    self = bytes.withUnsafeBytes { raw in
      (0..<(raw.count / 4)).map { i in
        let bits = raw.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self)
        return Float(bitPattern: UInt32(littleEndian: bits))
      }
    }
  }
}

// MARK: - Summary

/// What tells two outputs apart at a glance.
public struct Summary: Equatable, Sendable, Codable {
  public let min, max: Float
  public let mean: Double
  /// CRC-32 of the raw file, as `zlib.crc32` in Python computes it.
  public let checksum: UInt32

  public init(_ tensor: Tensor) {
    min = tensor.values.min() ?? 0
    max = tensor.values.max() ?? 0
    mean = tensor.values.reduce(0) { $0 + Double($1) } / Double(tensor.values.count)
    checksum = crc32(tensor.rawBytes)
  }
}

/// CRC-32 of ISO 3309, whose polynomial reversed is 0xEDB88320.
func crc32(_ bytes: Data) -> UInt32 {
  let table = (0..<256).map { byte in
    (0..<8).reduce(UInt32(byte)) { rest, _ in rest >> 1 ^ (rest & 1 == 1 ? 0xEDB8_8320 : 0) }
  }
  return ~bytes.reduce(~0) { rest, byte in
    rest >> 8 ^ table[Int(UInt8(truncatingIfNeeded: rest) ^ byte)]
  }
}
