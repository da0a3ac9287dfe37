// What WTConvCore uses of Apple's framework Core ML, for machines that do not have it. A prediction
// is torch_bridge.coreml's evaluator's, in the process that runs the tests.
//
// Declarations are Apple's, shortened; the page beside each is under
// https://developer.apple.com/documentation/coreml/.
//
// Environment: FAKE_COREML is a folder with the pipes `requests` and `replies`.

@_exported import Foundation

// mlcomputeunits
public enum MLComputeUnits: Int {
  case cpuOnly = 0
  case cpuAndGPU = 1
  case all = 2
  case cpuAndNeuralEngine = 3
}

// mlmodelconfiguration
open class MLModelConfiguration {
  public init() {}

  // mlmodelconfiguration/computeunits
  open var computeUnits: MLComputeUnits = .all
}

// mlmultiarraydatatype
public enum MLMultiArrayDataType: Int {
  case double = 65600
  case float32 = 65568
  case float16 = 65552
  case int32 = 131104
}

// mlmultiarray
open class MLMultiArray {
  // mlmultiarray/shape
  public let shape: [NSNumber]
  // mlmultiarray/strides
  public let strides: [NSNumber]
  // mlmultiarray/datatype
  public let dataType: MLMultiArrayDataType

  private let bytes: UnsafeMutableRawBufferPointer

  // mlmultiarray/init(shape:datatype:)
  public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
    self.shape = shape
    self.dataType = dataType
    // Apple's memory may have gaps, this has one after each row.
    var steps: [Int] = []
    for size in shape.reversed() {
      guard let last = steps.last else {
        steps = [1, size.intValue + 3]
        continue
      }
      steps.append(last * size.intValue)
    }
    strides = steps.dropLast().reversed().map { NSNumber(value: $0) }
    bytes = .allocate(byteCount: 4 * (steps.last ?? 1), alignment: 64)
    bytes.initializeMemory(as: UInt8.self, repeating: 0xFF)
  }

  deinit { bytes.deallocate() }

  // mlmultiarray/withunsafemutablebytes(_:)
  public func withUnsafeMutableBytes<R>(
    _ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R
  ) rethrows -> R {
    try body(bytes, strides.map(\.intValue))
  }

  // mlmultiarray/withunsafebytes(_:)
  public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
    try body(UnsafeRawBufferPointer(bytes))
  }
}

// mlfeaturevalue
open class MLFeatureValue {
  // mlfeaturevalue/multiarrayvalue
  public let multiArrayValue: MLMultiArray?

  // mlfeaturevalue/init(multiarray:)
  public init(multiArray value: MLMultiArray) { multiArrayValue = value }
}

// mlfeatureprovider
public protocol MLFeatureProvider {
  // mlfeatureprovider/featurenames
  var featureNames: Set<String> { get }
  // mlfeatureprovider/featurevalue(for:)
  func featureValue(for featureName: String) -> MLFeatureValue?
}

// mldictionaryfeatureprovider
open class MLDictionaryFeatureProvider: MLFeatureProvider {
  private let values: [String: MLFeatureValue]

  // mldictionaryfeatureprovider/init(dictionary:)
  public init(dictionary: [String: Any]) throws {
    values = try dictionary.mapValues { value in
      guard let value = value as? MLFeatureValue else { throw Failure("no feature: \(value)") }
      return value
    }
  }

  public var featureNames: Set<String> { Set(values.keys) }

  public func featureValue(for featureName: String) -> MLFeatureValue? { values[featureName] }
}

// mlmodel
open class MLModel {
  private let package: String

  // mlmodel/init(contentsof:configuration:)
  public convenience init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
    try self.init(url)
  }

  // mlmodel/compilemodel(at:)-6442s
  @available(*, deprecated, message: "Use the asynchronous interface.")
  open class func compileModel(at modelURL: URL) throws -> URL {
    throw Failure("nobody calls this")
  }

  // mlmodel/compilemodel(at:)-45ao6
  open class func compileModel(at url: URL) async throws -> URL {
    let compiled = FileManager.default.temporaryDirectory
      .appendingPathComponent("\(UUID().uuidString).mlmodelc")
    try FileManager.default.createDirectory(at: compiled, withIntermediateDirectories: false)
    try url.path.write(
      to: compiled.appendingPathComponent("package"), atomically: false, encoding: .utf8)
    return compiled
  }

  // mlmodel/prediction(from:)-9y2aa
  open func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
    try evaluate(input)
  }

  // MARK: - What the fake does

  private init(_ url: URL) throws {
    package = try String(contentsOf: url.appendingPathComponent("package"), encoding: .utf8)
  }

  private func evaluate(_ input: any MLFeatureProvider) throws -> any MLFeatureProvider {
    guard let folder = ProcessInfo.processInfo.environment["FAKE_COREML"] else {
      throw Failure("FAKE_COREML is not set")
    }
    func file(_ name: String) -> String { "\(folder)/\(name)" }
    var inputs: [String: [Int]] = [:]
    for name in input.featureNames {
      guard let array = input.featureValue(for: name)?.multiArrayValue else {
        throw Failure("\(name) is no array")
      }
      inputs[name] = array.shape.map(\.intValue)
      try array.packed().write(to: URL(fileURLWithPath: file("\(name).f32")))
    }
    let request: [String: Any] = ["package": package, "inputs": inputs]
    // Each end of a pipe waits for the other.
    try JSONSerialization.data(withJSONObject: request)
      .append(to: file("requests"))
    let reply = try FileHandle(forReadingFrom: URL(fileURLWithPath: file("replies"))).readToEnd()
    let answer = try JSONSerialization.jsonObject(with: reply ?? Data()) as? [String: Any]
    guard let outputs = answer?["outputs"] as? [String: [Int]] else {
      throw Failure(answer?["error"] as? String ?? "the evaluator does not answer")
    }
    let values = try outputs.map { name, shape in
      let array = try MLMultiArray(
        shape: shape.map { NSNumber(value: $0) }, dataType: .float32)
      array.unpack(try Data(contentsOf: URL(fileURLWithPath: file("\(name).f32"))))
      return (name, MLFeatureValue(multiArray: array))
    }
    return try MLDictionaryFeatureProvider(dictionary: Dictionary(uniqueKeysWithValues: values))
  }
}

private struct Failure: LocalizedError {
  let errorDescription: String?

  init(_ text: String) { errorDescription = text }
}

extension Data {
  fileprivate func append(to path: String) throws {
    let file = try FileHandle(forWritingTo: URL(fileURLWithPath: path))
    try file.write(contentsOf: self)
    try file.close()
  }
}

extension MLMultiArray {
  /// Where rows begin, and their length, in bytes.
  private var rows: (starts: [Int], length: Int) {
    let sizes = shape.map(\.intValue)
    let steps = strides.map(\.intValue)
    var starts = [0]
    for (size, step) in zip(sizes, steps).dropLast() {
      starts = starts.flatMap { start in (0..<size).map { start + $0 * step } }
    }
    return (starts.map { 4 * $0 }, 4 * (sizes.last ?? 1))
  }

  fileprivate func packed() -> Data {
    let (starts, length) = rows
    return withUnsafeBytes { bytes in
      starts.reduce(into: Data()) { $0.append(contentsOf: bytes[$1..<($1 + length)]) }
    }
  }

  fileprivate func unpack(_ data: Data) {
    let (starts, length) = rows
    withUnsafeMutableBytes { bytes, _ in
      for (row, start) in starts.enumerated() {
        bytes[start..<(start + length)].copyBytes(from: data[(row * length)..<((row + 1) * length)])
      }
    }
  }
}
