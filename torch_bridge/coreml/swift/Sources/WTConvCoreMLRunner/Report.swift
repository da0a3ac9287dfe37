import Foundation
import WTConvCore

/// What the command prints.
struct Report: Encodable {
  let backend: String
  let model: String
  let shape: [Int]
  let levels: Int
  let runs: Int
  /// Median milliseconds of each stage.
  let milliseconds: [Stage]
  let output: Summary

  struct Stage {
    let name: String
    let median: Double
  }

  private enum Key: String, CodingKey {
    case backend, model, shape, levels, runs, milliseconds, output
  }

  private struct Name: CodingKey {
    let stringValue: String
    var intValue: Int? { nil }

    init(_ name: String) { stringValue = name }
    init(stringValue: String) { self.init(stringValue) }
    init?(intValue: Int) { nil }
  }

  func encode(to encoder: any Encoder) throws {
    var all = encoder.container(keyedBy: Key.self)
    try all.encode(backend, forKey: .backend)
    try all.encode(model, forKey: .model)
    try all.encode(shape, forKey: .shape)
    try all.encode(levels, forKey: .levels)
    try all.encode(runs, forKey: .runs)
    var stages = all.nestedContainer(keyedBy: Name.self, forKey: .milliseconds)
    for stage in milliseconds { try stages.encode(stage.median, forKey: Name(stage.name)) }
    try all.encode(output, forKey: .output)
  }

  /// One JSON object, its keys sorted.
  func json() throws -> String {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    // JSON has no numbers for what an output may hold.
    encoder.nonConformingFloatEncodingStrategy = .convertToString(
      positiveInfinity: "inf", negativeInfinity: "-inf", nan: "nan")
    return String(decoding: try encoder.encode(self), as: UTF8.self)
  }

  /// Lines for people.
  var text: String {
    let sizes = shape.dropFirst().map(String.init).joined(separator: " x ")
    let stages = milliseconds.map { stage in
      "  \(stage.name.padding(toLength: 14, withPad: " ", startingAt: 0))"
        + String(format: "%10.3f ms", stage.median)
    }
    let checksum = String(format: "%08x", output.checksum)
    let head = ["\(backend), \(sizes), levels \(levels), \(model)", "median of \(runs):"]
    let foot = "output: min \(output.min), max \(output.max), mean \(output.mean), "
    return (head + stages + [foot + "CRC-32 \(checksum)"]).joined(separator: "\n")
  }
}

extension Report.Stage {
  /// The median of some durations; the mean of the two in the middle of an even number.
  init(_ name: String, _ times: [Duration]) {
    let sorted = times.sorted()
    let middle = (sorted[(sorted.count - 1) / 2] + sorted[sorted.count / 2]) / 2
    let (seconds, attoseconds) = middle.components
    self.init(name: name, median: Double(seconds) * 1e3 + Double(attoseconds) * 1e-15)
  }
}
