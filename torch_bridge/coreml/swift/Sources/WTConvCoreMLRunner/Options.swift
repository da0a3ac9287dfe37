/// A sentence about what is wrong with the arguments.
struct Misuse: Error, CustomStringConvertible {
  let description: String

  init(_ description: String) { self.description = description }
}

/// What computes the Haar transforms and the convolutions.
enum Backend: String, CaseIterable {
  case metal
  case cpu
  case coreMLWhole = "coreml-whole"

  /// The package that it takes where none is named; the exporter writes it under this name.
  var defaultModel: String {
    self == .coreMLWhole ? "Models/WTConvWhole.mlpackage" : "Models/WTConvConvModules.mlpackage"
  }

  /// The kind of package that it takes.
  var kind: String { self == .coreMLWhole ? "whole" : "convs" }
}

/// The command's arguments.
struct Options {
  static let usage = """
    usage: WTConvCoreMLRunner --channels C --height H --width W [options]

      --model PACKAGE      the .mlpackage; Models/WTConvConvModules.mlpackage if not named, for the
                           backend coreml-whole Models/WTConvWhole.mlpackage
      --channels C, --height H, --width W
                           sizes of the input, one image
      --levels L           wavelet levels of the model (1)
      --backend NAME       metal: Haar transforms by wtconv.metal, convolutions by Core ML (default)
                           cpu: both in plain Swift, on any machine
                           coreml-whole: all of it by Core ML, of a package of kind "whole"
      --input-f32 FILE     C * H * W little-endian float32 numbers; a formula fills the input if none
      --output-f32 FILE    where the output goes, in the same format
      --repeat N           runs, of whose times the medians are printed (1)
      --json               print one JSON object
      --help               print this
    """

  var channels = 0, height = 0, width = 0
  var levels = 1
  var backend = Backend.metal
  var repetitions = 1
  var model: String?
  var input: String?
  var output: String?
  var json = false
  var help = false

  /// Throws `Misuse` where arguments cannot be understood.
  init(_ arguments: some Sequence<String>) throws {
    var rest = Array(arguments)[...]
    var seen: Set<String> = []
    while let name = rest.popFirst() {
      guard seen.insert(name).inserted else { throw Misuse("\(name) is given twice") }
      func value() throws -> String {
        guard let value = rest.popFirst(), !value.isEmpty, !value.hasPrefix("--") else {
          throw Misuse("\(name) needs a value; --help lists the options")
        }
        return value
      }
      func number(from least: Int) throws -> Int {
        let text = try value()
        guard let number = Int(text), number >= least else {
          throw Misuse("\(name) is \(text), expected a whole number of at least \(least)")
        }
        return number
      }
      switch name {
      case "--channels": channels = try number(from: 1)
      case "--height": height = try number(from: 1)
      case "--width": width = try number(from: 1)
      case "--levels": levels = try number(from: 0)
      case "--repeat": repetitions = try number(from: 1)
      case "--model": model = try value()
      case "--input-f32": input = try value()
      case "--output-f32": output = try value()
      case "--json": json = true
      case "--help": help = true
      case "--backend":
        let text = try value()
        guard let backend = Backend(rawValue: text) else {
          let names = Backend.allCases.map(\.rawValue).joined(separator: ", ")
          throw Misuse("--backend is \(text), expected one of \(names)")
        }
        self.backend = backend
      default: throw Misuse("there is no option \(name); --help lists the options")
      }
    }
    if help { return }
    for name in ["--channels", "--height", "--width"] where !seen.contains(name) {
      throw Misuse("\(name) is missing; --help lists the options")
    }
  }
}
