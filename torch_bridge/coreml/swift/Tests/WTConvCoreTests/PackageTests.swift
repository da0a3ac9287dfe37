import Foundation
import Testing

@testable import WTConvCore

@Suite struct PackageTests {
  @Test func fieldsOfAMessageAreRead() throws {
    // 1: 300, 2: "hi", 3: packed 1 and 2^35, 4: packed float 1, 5: float 0.5, 6: float64 bits.
    let bytes: [UInt8] = [
      0x08, 0xAC, 0x02, 0x12, 2, 0x68, 0x69, 0x1A, 7, 1, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01,
      0x22, 4, 0, 0, 0x80, 0x3F, 0x2D, 0, 0, 0, 0x3F, 0x31, 1, 0, 0, 0, 0, 0, 0, 0,
    ]
    let message = try ProtobufMessage(bytes[...])
    #expect(try message.integers(1) == [300])
    #expect(try message.strings(2) == ["hi"])
    #expect(try message.integers(3) == [1, 1 << 35])
    #expect(try message.floats(4) + message.floats(5) == [1, 0.5])
    #expect(try message.integers(6) == [1])
    #expect(try message.integers(7) == [])
  }

  @Test(arguments: [
    [0x08], [0x12, 5, 1], [0x0B], [0x2D, 0, 0], [0x12, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F],
    [UInt8](repeating: 0xFF, count: 11),
  ])
  func damagedMessagesAreErrors(bytes: [UInt8]) {
    #expect(throws: WTConvError.self) { try ProtobufMessage(bytes[...]) }
  }

  @Test func aNumberIsNoMessage() throws {
    let message = try ProtobufMessage([0x08, 1][...])
    #expect(throws: WTConvError.self) { try message.messages(1) }
  }

  @Test func whatIsNoPackageIsAnError() throws {
    let url = URL(fileURLWithPath: temporaryPath())
    #expect(throws: WTConvError.self) { try WTConvPackage(contentsOf: url) }
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: false)
    defer { try? FileManager.default.removeItem(at: url) }
    #expect(throws: WTConvError.self) { try WTConvPackage(contentsOf: url) }
    let manifest = """
      {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "model.mlmodel"}}}
      """
    try manifest.write(
      to: url.appendingPathComponent("Manifest.json"), atomically: true, encoding: .utf8)
    #expect(throws: WTConvError.self) { try WTConvPackage(contentsOf: url) }
  }
}
