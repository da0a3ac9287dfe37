import Foundation

/// What can go wrong; each case holds a sentence for people.
public enum WTConvError: Error, Equatable, CustomStringConvertible, LocalizedError {
  /// Numbers, shapes or levels do not fit together.
  case shape(String)
  /// A file cannot be read or written, or has another length.
  case file(String)
  /// A Core ML package is damaged, of another kind, or made for other shapes.
  case model(String)
  /// This build or this machine cannot do what was asked for.
  case unavailable(String)
  /// Metal or Core ML failed while it computed.
  case failed(String)

  public var description: String {
    switch self {
    case .shape(let text), .file(let text), .model(let text), .unavailable(let text),
      .failed(let text):
      return text
    }
  }

  public var errorDescription: String? { description }
}
