import Foundation

/// An `.mlpackage` that `python -m torch_bridge.coreml export` wrote, read without Core ML.
///
/// Numbers of fields are those of Apple's Model.proto and MIL.proto:
/// https://github.com/apple/coremltools/tree/main/mlmodel/format
public struct WTConvPackage {
  /// What the exporter wrote into the metadata, e.g. "flash_wtconv.levels".
  public let metadata: [String: String]

  private let path: String
  private let model: ProtobufMessage
  private let weights: URL

  /// Reads the program; throws `WTConvError.model` where there is no package or it is damaged.
  public init(contentsOf url: URL) throws {
    path = url.relativePath
    let file = try Self.program(of: url)
    weights = file.deletingLastPathComponent()
    do {
      model = try ProtobufMessage([UInt8](try Data(contentsOf: file))[...])
      var metadata: [String: String] = [:]
      for entry in try model.message(2)?.message(100)?.messages(100) ?? [] {
        metadata[try entry.strings(1).last ?? ""] = try entry.strings(2).last ?? ""
      }
      self.metadata = metadata
    } catch let error as WTConvError {
      throw WTConvError.model("\(path) cannot be read: \(error)")
    } catch {
      throw WTConvError.file("cannot read \(file.path): \(error.localizedDescription)")
    }
  }

  /// Throws `WTConvError.model` unless the package is of this kind and these sizes.
  ///
  /// A flexible package takes all sizes that its input declares.
  public func check(
    kind: String, channels: Int, height: Int, width: Int, levels: Int
  ) throws {
    let found = metadata["flash_wtconv.kind"] ?? "none of ours"
    guard found == kind else {
      throw WTConvError.model(
        "\(path) is of kind \(found), expected \(kind): export one with "
          + "`python -m torch_bridge.coreml export`")
    }
    guard metadata["flash_wtconv.levels"] == String(levels) else {
      throw WTConvError.model(
        "\(path) has \(metadata["flash_wtconv.levels"] ?? "no") levels, asked for \(levels)")
    }
    let shape = [1, channels, height, width]
    guard try takes(shape) else {
      let made = ["channels", "height", "width"].map { metadata["flash_wtconv.\($0)"] ?? "?" }
      throw WTConvError.model(
        "\(path) was made for \(made.joined(separator: " x ")) (channels x height x width), asked "
          + "for \(channels) x \(height) x \(width)")
    }
  }

  /// Whether the input x may have a shape.
  private func takes(_ shape: [Int]) throws -> Bool {
    let inputs = try model.message(2)?.messages(1) ?? []
    let x = try inputs.first { try $0.strings(1) == ["x"] }
    guard let array = try x?.message(3)?.message(5) else { return false }
    if let range = try array.message(31) {
      let sides = try range.messages(1)
      return try sides.count == shape.count
        && zip(sides, shape).allSatisfy { side, size in
          let most = try side.integers(2).last ?? 0
          return try (side.integers(1).last ?? 0) <= size && (most < 0 || size <= most)
        }
    }
    if let enumerated = try array.message(21) {
      return try enumerated.messages(1).contains { try $0.integers(1) == shape }
    }
    return try array.integers(1) == shape
  }

  /// The file of the program, which the package's manifest names.
  private static func program(of package: URL) throws -> URL {
    let path = package.relativePath
    guard FileManager.default.fileExists(atPath: package.path) else {
      throw WTConvError.model(
        "there is no model \(path): export one with `python -m torch_bridge.coreml export`, or "
          + "name another")
    }
    let manifest = package.appendingPathComponent("Manifest.json")
    guard let data = FileManager.default.contents(atPath: manifest.path),
      let root = try? JSONSerialization.jsonObject(with: data) as? [String: Any],
      let name = root["rootModelIdentifier"] as? String,
      let items = root["itemInfoEntries"] as? [String: [String: Any]],
      let item = items[name]?["path"] as? String
    else {
      throw WTConvError.model("\(path) is no .mlpackage: its Manifest.json names no model")
    }
    return package.appendingPathComponent("Data").appendingPathComponent(item)
  }
}

// MARK: - Convolutions

extension WTConvPackage {
  /// The convolutions of a package of kind "convs", for the CPU.
  ///
  /// Throws `WTConvError.model` where the program has anything but convolutions and casts, or
  /// weights that are compressed.
  public func convolutions() throws -> CPUConvolutionRunner {
    do {
      let program = try Program(model, weights: weights)
      let count = Int(metadata["flash_wtconv.levels"] ?? "") ?? 0
      return CPUConvolutionRunner(
        base: try program.convolution("base", of: "x"),
        levels: try (0..<count).map { level in
          try program.convolution("filtered_\(level + 1)", of: "bands_\(level + 1)")
        })
    } catch let error as WTConvError {
      throw WTConvError.model("the backend cpu cannot run \(path): \(error)")
    }
  }
}

/// The operations of the function `main` of a program, by the names of what they compute.
private struct Program {
  private struct Operation {
    let type: String
    /// Names of values, or constants, by the argument's name.
    let arguments: [String: Argument]
  }

  private enum Argument {
    case name(String)
    case constant(ProtobufMessage)
  }

  private var operations: [String: Operation] = [:]
  private let weights: URL

  init(_ model: ProtobufMessage, weights: URL) throws {
    self.weights = weights
    guard let main = try model.message(502)?.map(2)["main"],
      let block = try main.map(3).values.first
    else { throw WTConvError.model("it has no ML program") }
    for operation in try block.messages(3) {
      var arguments: [String: Argument] = [:]
      for (name, argument) in try operation.map(2) {
        guard let binding = try argument.messages(1).first else { continue }
        if let constant = try binding.message(2) {
          arguments[name] = .constant(constant)
        } else {
          arguments[name] = .name(try binding.strings(1).last ?? "")
        }
      }
      for (name, value) in try operation.map(5) { arguments[name] = .constant(value) }
      let type = try operation.strings(1).last ?? ""
      for result in try operation.messages(3) {
        operations[try result.strings(1).last ?? ""] = Operation(type: type, arguments: arguments)
      }
    }
  }

  /// The convolution that computes an output of an input, with casts before and after it perhaps.
  func convolution(_ output: String, of input: String) throws -> CPUConvolutionRunner.Depthwise {
    let convolution = try uncast(output)
    guard let operation = operations[convolution], operation.type == "conv",
      case .name(let source) = operation.arguments["x"], try uncast(source) == input
    else { throw WTConvError.model("output \(output) is no convolution of \(input)") }
    let taps = try tensor("weight", of: operation)
    let k = taps.shape.last ?? 0
    let pad = [(k - 1) / 2, k / 2, (k - 1) / 2, k / 2]
    guard try text("pad_type", of: operation) == "custom",
      try integers("pad", of: operation) == pad,
      try integers("strides", of: operation).allSatisfy({ $0 == 1 }),
      try integers("dilations", of: operation).allSatisfy({ $0 == 1 }),
      try integers("groups", of: operation) == [taps.shape[0]]
    else {
      throw WTConvError.model(
        "output \(output) is no depthwise convolution that keeps its input's size")
    }
    let bias =
      operation.arguments["bias"] == nil ? nil : try tensor("bias", of: operation).values
    return try CPUConvolutionRunner.Depthwise(taps: taps, bias: bias)
  }

  /// The name of what casts made a value of.
  private func uncast(_ name: String) throws -> String {
    var name = name
    // A damaged program may lead round in circles.
    for _ in operations {
      guard let operation = operations[name], operation.type == "cast",
        case .name(let source) = operation.arguments["x"]
      else { break }
      name = source
    }
    return name
  }

  /// The message of a constant argument.
  private func constant(_ name: String, of operation: Operation) throws -> ProtobufMessage? {
    switch operation.arguments[name] {
    case nil: return nil
    case .constant(let value): return value
    case .name(let source):
      guard let found = operations[source], found.type == "const",
        case .constant(let value) = found.arguments["val"]
      else {
        throw WTConvError.model(
          "\(name) is computed by \(operations[source]?.type ?? "nothing"), expected a constant; "
            + "export it without compression")
      }
      return value
    }
  }

  private func text(_ name: String, of operation: Operation) throws -> String? {
    try constant(name, of: operation)?.message(3)?.message(1)?.message(4)?.strings(1).first
  }

  private func integers(_ name: String, of operation: Operation) throws -> [Int] {
    try constant(name, of: operation)?.message(3)?.message(1)?.message(2)?.integers(1) ?? []
  }

  /// The numbers of a constant of float32 or float16, in the program or in the file of weights.
  private func tensor(_ name: String, of operation: Operation) throws -> Tensor {
    guard let value = try constant(name, of: operation),
      let type = try value.message(2)?.message(1)
    else { throw WTConvError.model("a convolution has no \(name)") }
    let shape = try type.messages(3).map { try $0.message(1)?.integers(1).last ?? 0 }
    let size: Int
    switch try type.integers(1).last {
    case 11: size = 4
    case 10: size = 2
    default: throw WTConvError.model("\(name) is neither float32 nor float16")
    }
    if let immediate = try value.message(3)?.message(1) {
      if let floats = try immediate.message(1) {
        return try Tensor(shape: shape, values: floats.floats(1))
      }
      let bytes = try immediate.message(7)?.bytes(1).last ?? []
      return try Tensor(shape: shape, values: Self.numbers(bytes, size: size))
    }
    guard let file = try value.message(5) else {
      throw WTConvError.model("\(name) has no numbers")
    }
    let bytes = try blob(
      file.strings(1).last ?? "", offset: file.integers(2).last ?? 0,
      count: size * Tensor.count(of: shape))
    return try Tensor(shape: shape, values: Self.numbers(bytes[...], size: size))
  }

  /// Bytes of the file of weights, which a record at an offset describes.
  ///
  /// The record holds 0xDEADBEEF, a type, the number of bytes and where they are, little-endian:
  /// https://github.com/apple/coremltools/blob/main/mlmodel/src/MILBlob/Blob/StorageFormat.hpp
  private func blob(_ name: String, offset: Int, count: Int) throws -> [UInt8] {
    let damaged = WTConvError.model("its weights are damaged: export it again")
    let inside = name.replacingOccurrences(of: "@model_path/", with: "")
    let url = weights.appendingPathComponent(inside)
    guard let file = FileHandle(forReadingAtPath: url.path) else {
      throw WTConvError.model("there is no file \(url.path)")
    }
    defer { try? file.close() }
    func read(_ offset: UInt64, _ count: Int) throws -> [UInt8] {
      try file.seek(toOffset: offset)
      guard let data = try file.read(upToCount: count), data.count == count else { throw damaged }
      return [UInt8](data)
    }
    func number(_ bytes: ArraySlice<UInt8>) -> UInt64 {
      bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
    guard let start = UInt64(exactly: offset) else { throw damaged }
    do {
      let record = try read(start, 24)
      guard number(record[0..<4]) == 0xDEAD_BEEF, number(record[8..<16]) == UInt64(count) else {
        throw damaged
      }
      return try read(number(record[16..<24]), count)
    } catch {
      // A place beyond the largest file is an error of the system.
      throw damaged
    }
  }

  /// Numbers of little-endian bytes: float32 of size 4, float16 of size 2.
  private static func numbers(_ bytes: ArraySlice<UInt8>, size: Int) -> [Float] {
    guard size == 2 else { return [Float](littleEndian: bytes) }
    let all = [UInt8](bytes)
    return stride(from: 0, to: all.count - 1, by: 2).map { i in
      number(half: UInt16(all[i]) | UInt16(all[i + 1]) << 8)
    }
  }

  /// The number of the bits of a float16; Swift has no such type on Macs with Intel processors.
  private static func number(half bits: UInt16) -> Float {
    let exponent = Int(bits >> 10 & 31)
    let fraction = Float(bits & 1023)
    let sign: Float = bits >> 15 == 0 ? 1 : -1
    switch exponent {
    case 0: return sign * fraction * 0x1p-24
    case 31: return fraction == 0 ? sign * .infinity : .nan
    default: return sign * Float(sign: .plus, exponent: exponent - 25, significand: 1024 + fraction)
    }
  }
}
