import Foundation
import WTConvCore

/// Runs an exported layer on one image; the exit status is 2 where it cannot do what is asked.
@main
struct Command {
  static func main() async {
    do {
      let options = try Options(CommandLine.arguments.dropFirst())
      if options.help {
        print(Options.usage)
        return
      }
      let report = try await run(options)
      print(options.json ? try report.json() : report.text)
    } catch {
      FileHandle.standardError.write(Data("WTConvCoreMLRunner: \(sentence(error))\n".utf8))
      exit(2)
    }
  }

  private static func sentence(_ error: any Error) -> String {
    switch error {
    case let misuse as Misuse: return misuse.description
    case let error as WTConvError: return error.description
    default: return error.localizedDescription
    }
  }

  private static func run(_ options: Options) async throws -> Report {
    let model = options.model ?? options.backend.defaultModel
    let url = URL(fileURLWithPath: model)
    let package = try WTConvPackage(contentsOf: url)
    try package.check(
      kind: options.backend.kind, channels: options.channels, height: options.height,
      width: options.width, levels: options.levels)
    // Sizes that a model has fit into memory.
    let image = try input(options)
    let layer = try await layer(options, package: package, at: url)

    var times: [(total: Duration, stages: [(name: String, time: Duration)])] = []
    var output = image
    let clock = ContinuousClock()
    for _ in 0..<options.repetitions {
      var stages: [(name: String, time: Duration)] = []
      let total = try clock.measure { (output, stages) = try layer(image) }
      times.append((total, stages))
    }
    if let path = options.output { try output.write(rawFile: path) }

    let names = times[0].stages.map(\.name)
    let stages = names.indices.map { i in
      Report.Stage(names[i], times.map { $0.stages[i].time })
    }
    return Report(
      backend: options.backend.rawValue, model: model, shape: image.shape,
      levels: options.levels, runs: options.repetitions,
      milliseconds: stages + [Report.Stage("total", times.map(\.total))],
      output: Summary(output))
  }

  private static func input(_ options: Options) throws -> Tensor {
    let (channels, height, width) = (options.channels, options.height, options.width)
    guard let path = options.input else {
      return try .formula(channels: channels, height: height, width: width)
    }
    return try Tensor(rawFile: path, shape: [1, channels, height, width])
  }

  /// The output of a layer, and how long each of its stages took.
  private typealias Layer = (Tensor) throws -> (Tensor, [(name: String, time: Duration)])

  private static func layer(
    _ options: Options, package: WTConvPackage, at url: URL
  ) async throws -> Layer {
    switch options.backend {
    case .cpu:
      return staged(CPUHaarRunner(), try package.convolutions(), options)
    case .metal, .coreMLWhole:
      #if canImport(Metal) && canImport(CoreML)
      let haar = options.backend == .metal ? try MetalHaarRunner() : nil
      let runner = try await CoreMLWTConvRunner.compiling(package: url)
      if let haar { return staged(haar, runner, options) }
      return { image in
        var output = image
        let time = try ContinuousClock().measure { output = try runner.whole(image) }
        return (output, [("whole", time)])
      }
      #else
      throw WTConvError.unavailable(
        "this machine has no Metal and no Core ML, which the backend "
          + "\(options.backend.rawValue) needs; use --backend cpu")
      #endif
    }
  }

  private static func staged(
    _ haar: some HaarRunner, _ convolutions: some ConvolutionRunner, _ options: Options
  ) -> Layer {
    let layer = WTConvLayer(haar: haar, convolutions: convolutions, levels: options.levels)
    return { image in
      var times = WTConvLayer.Times()
      let output = try layer(image, times: &times)
      let stages = [
        ("haar", times.haar), ("convolutions", times.convolutions),
        ("inverse", times.inverse), ("sum", times.sum),
      ]
      return (output, stages)
    }
  }
}
