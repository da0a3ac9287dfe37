#if canImport(Metal) && canImport(CoreML)
import CoreML
import Foundation

/// A package that Core ML runs: the convolutions of a layer (kind "convs"), or all of it ("whole").
public final class CoreMLWTConvRunner: ConvolutionRunner {
  private let model: MLModel
  /// A folder of temporary files that holds what was compiled for this runner alone.
  private let temporary: URL?

  /// Loads a model that Xcode or `MLModel` compiled: an `.mlmodelc`.
  public convenience init(compiledModel url: URL, computeUnits: MLComputeUnits = .all) throws {
    try self.init(url, computeUnits, temporary: nil)
  }

  /// Compiles an `.mlpackage` and loads it.
  ///
  /// In an app let Xcode compile the package, and load that.
  public static func compiling(
    package url: URL, computeUnits: MLComputeUnits = .all
  ) async throws -> CoreMLWTConvRunner {
    let compiled: URL
    do {
      compiled = try await MLModel.compileModel(at: url)
    } catch {
      throw WTConvError.model(
        "Core ML does not compile \(url.path): \(error.localizedDescription)")
    }
    return try CoreMLWTConvRunner(compiled, computeUnits, temporary: compiled)
  }

  private init(_ url: URL, _ computeUnits: MLComputeUnits, temporary: URL?) throws {
    let configuration = MLModelConfiguration()
    configuration.computeUnits = computeUnits
    do {
      model = try MLModel(contentsOf: url, configuration: configuration)
    } catch {
      throw WTConvError.model("Core ML does not load \(url.path): \(error.localizedDescription)")
    }
    self.temporary = temporary
  }

  deinit {
    // Nobody else knows of it, and the system removes what stays.
    if let temporary { try? FileManager.default.removeItem(at: temporary) }
  }

  public func convolve(
    _ image: Tensor, bands: [Tensor]
  ) throws -> (base: Tensor, filtered: [Tensor]) {
    var inputs = ["x": image]
    for (level, tensor) in bands.enumerated() { inputs["bands_\(level + 1)"] = tensor }
    let outputs = try predict(inputs)
    let filtered = try bands.indices.map { level in
      try outputs("filtered_\(level + 1)", bands[level].shape)
    }
    return (try outputs("base", image.shape), filtered)
  }

  /// The output of a package of kind "whole" for an image `[1, C, H, W]`.
  public func whole(_ image: Tensor) throws -> Tensor {
    try predict(["x": image])("y", image.shape)
  }

  /// Runs the model; returns a function that gives an output of a name and a shape.
  private func predict(_ inputs: [String: Tensor]) throws -> (String, [Int]) throws -> Tensor {
    let found: any MLFeatureProvider
    do {
      let values = try inputs.mapValues { MLFeatureValue(multiArray: try MLMultiArray($0)) }
      found = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: values))
    } catch {
      throw WTConvError.failed("Core ML failed: \(error.localizedDescription)")
    }
    return { name, shape in
      guard let array = found.featureValue(for: name)?.multiArrayValue else {
        throw WTConvError.model(
          "the model has no output \(name), but \(found.featureNames.sorted()); "
            + "is it of the kind that is asked for?")
      }
      let tensor = try array.tensor(name)
      guard tensor.shape == shape else {
        throw WTConvError.model("output \(name) has shape \(tensor.shape), expected \(shape)")
      }
      return tensor
    }
  }
}

extension MLMultiArray {
  /// A copy of a tensor. The memory that Core ML gives may have gaps between rows.
  fileprivate convenience init(_ tensor: Tensor) throws {
    try self.init(shape: tensor.shape.map { NSNumber(value: $0) }, dataType: .float32)
    withUnsafeMutableBytes { bytes, strides in
      let target = bytes.bindMemory(to: Float.self)
      forEachRow(shape: tensor.shape, strides: strides) { row, start, count, stride in
        for i in 0..<count { target[start + i * stride] = tensor.values[row * count + i] }
      }
    }
  }

  /// A copy of an array of float32.
  fileprivate func tensor(_ name: String) throws -> Tensor {
    guard dataType == .float32 else {
      throw WTConvError.model(
        "output \(name) has numbers of the type \(dataType.rawValue), expected float32")
    }
    var tensor = try Tensor(zeros: shape.map { $0.intValue })
    let steps = strides.map { $0.intValue }
    withUnsafeBytes { bytes in
      let source = bytes.bindMemory(to: Float.self)
      forEachRow(shape: tensor.shape, strides: steps) { row, start, count, stride in
        for i in 0..<count { tensor.values[row * count + i] = source[start + i * stride] }
      }
    }
    return tensor
  }
}

/// Calls with each row: its number, where it starts, its length and the stride within it.
private func forEachRow(
  shape: [Int], strides: [Int], _ body: (Int, Int, Int, Int) -> Void
) {
  guard let count = shape.last, let stride = strides.last else { return }
  let outer = shape.dropLast()
  for row in 0..<outer.reduce(1, *) {
    var (rest, start) = (row, 0)
    for (size, step) in zip(outer, strides).reversed() {
      start += rest % size * step
      rest /= size
    }
    body(row, start, count, stride)
  }
}
#endif
