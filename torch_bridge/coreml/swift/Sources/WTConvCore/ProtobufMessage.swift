/// A message in the wire format of protocol buffers, whose fields are read by their numbers.
///
/// The format: https://protobuf.dev/programming-guides/encoding
struct ProtobufMessage {
  private enum Field {
    case number(UInt64)
    case bytes(ArraySlice<UInt8>)
  }

  private var fields: [Int: [Field]] = [:]

  /// Throws `WTConvError.model` where bytes are no message.
  init(_ bytes: ArraySlice<UInt8>) throws {
    var rest = bytes
    while !rest.isEmpty {
      let key = try Self.number(&rest)
      let field: Field
      switch key & 7 {
      case 0: field = .number(try Self.number(&rest))
      case 1: field = .number(try Self.fixed(&rest, bytes: 8))
      case 2:
        guard let count = Int(exactly: try Self.number(&rest)) else { throw Self.damaged }
        field = .bytes(try Self.take(&rest, count))
      case 5: field = .number(try Self.fixed(&rest, bytes: 4))
      default: throw Self.damaged
      }
      guard let name = Int(exactly: key >> 3) else { throw Self.damaged }
      fields[name, default: []].append(field)
    }
  }

  /// The messages of a field, in their order.
  func messages(_ field: Int) throws -> [ProtobufMessage] {
    try bytes(field).map { try ProtobufMessage($0) }
  }

  /// The last message of a field; nil where there is none.
  func message(_ field: Int) throws -> ProtobufMessage? { try messages(field).last }

  /// The texts of a field.
  func strings(_ field: Int) throws -> [String] {
    try bytes(field).map { String(decoding: $0, as: UTF8.self) }
  }

  /// The entries of a map from texts to messages.
  func map(_ field: Int) throws -> [String: ProtobufMessage] {
    var found: [String: ProtobufMessage] = [:]
    for entry in try messages(field) {
      found[try entry.strings(1).last ?? ""] = try entry.message(2)
    }
    return found
  }

  /// The bytes of a field.
  func bytes(_ field: Int) throws -> [ArraySlice<UInt8>] {
    try fields[field, default: []].map { value in
      guard case .bytes(let bytes) = value else { throw Self.damaged }
      return bytes
    }
  }

  /// Whole numbers of a field, packed or not.
  func integers(_ field: Int) throws -> [Int] {
    try fields[field, default: []].flatMap { value -> [Int] in
      switch value {
      case .number(let number): return [Int(truncatingIfNeeded: number)]
      case .bytes(var packed):
        var numbers: [Int] = []
        while !packed.isEmpty {
          numbers.append(Int(truncatingIfNeeded: try Self.number(&packed)))
        }
        return numbers
      }
    }
  }

  /// Float32 numbers of a field, packed or not.
  func floats(_ field: Int) throws -> [Float] {
    try fields[field, default: []].flatMap { value -> [Float] in
      switch value {
      case .number(let number): return [Float(bitPattern: UInt32(truncatingIfNeeded: number))]
      case .bytes(let packed):
        guard packed.count % 4 == 0 else { throw Self.damaged }
        return [Float](littleEndian: packed)
      }
    }
  }

  private static let damaged = WTConvError.model("its program is damaged: export it again")

  private static func take(_ rest: inout ArraySlice<UInt8>, _ count: Int) throws
    -> ArraySlice<UInt8>
  {
    guard count <= rest.count else { throw damaged }
    let taken = rest.prefix(count)
    rest = rest.dropFirst(count)
    return taken
  }

  private static func fixed(_ rest: inout ArraySlice<UInt8>, bytes: Int) throws -> UInt64 {
    try take(&rest, bytes).reversed().reduce(0) { $0 << 8 | UInt64($1) }
  }

  /// A number in the format's base 128, lowest digits first.
  private static func number(_ rest: inout ArraySlice<UInt8>) throws -> UInt64 {
    var number: UInt64 = 0
    for shift in stride(from: 0, to: 64, by: 7) {
      guard let byte = rest.popFirst() else { throw damaged }
      number |= UInt64(byte & 127) << UInt64(shift)
      if byte < 128 { return number }
    }
    throw damaged
  }
}
