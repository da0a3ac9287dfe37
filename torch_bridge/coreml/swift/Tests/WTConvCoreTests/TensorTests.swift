import Foundation
import Testing

@testable import WTConvCore

/// A path of nothing in a folder of temporary files.
func temporaryPath() -> String {
  FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString).path
}

@Suite struct TensorTests {
  @Test func aRawFileHoldsLittleEndianNumbers() throws {
    let path = temporaryPath()
    defer { try? FileManager.default.removeItem(atPath: path) }
    let tensor = try Tensor(shape: [1, 1, 1, 2], values: [1, -0.5])
    try tensor.write(rawFile: path)
    #expect(
      FileManager.default.contents(atPath: path) == Data([0, 0, 0x80, 0x3F, 0, 0, 0, 0xBF]))
    #expect(try Tensor(rawFile: path, shape: [1, 1, 1, 2]) == tensor)
    #expect(throws: WTConvError.file("\(path) has 8 bytes, expected 12: 1 x 3 float32 numbers")) {
      try Tensor(rawFile: path, shape: [1, 3])
    }
  }

  @Test func aMissingFileAndAMissingFolderAreErrors() throws {
    let path = temporaryPath()
    #expect(throws: WTConvError.self) { try Tensor(rawFile: path, shape: [1]) }
    let tensor = try Tensor(zeros: [1])
    #expect(throws: WTConvError.self) { try tensor.write(rawFile: path + "/y.f32") }
  }

  @Test(arguments: [[0], [2, -1], [Int.max, 2], [1 << 62]])
  func shapesThatCannotBeAreErrors(shape: [Int]) {
    #expect(throws: WTConvError.self) { try Tensor(zeros: shape) }
  }

  @Test func valuesMustFillTheShape() {
    #expect(throws: WTConvError.shape("shape [2, 2] has 4 values, got 1")) {
      try Tensor(shape: [2, 2], values: [1])
    }
  }

  @Test func theFormulaIsThatOfPython() throws {
    let tensor = try Tensor.formula(channels: 1, height: 1, width: 3)
    #expect(tensor.values == [-0.9999943, 0.23607361, -0.5278584])
    #expect(tensor.shape == [1, 1, 1, 3])
  }

  @Test func theChecksumIsCRC32() {
    #expect(crc32(Data("123456789".utf8)) == 0xCBF4_3926)
  }

  @Test func aSummaryHoldsTheExtremesAndTheMean() throws {
    let summary = Summary(try Tensor(shape: [4], values: [1, -3, 2, 2]))
    #expect((summary.min, summary.max, summary.mean) == (-3, 2, 0.5))
  }

  @Test func onlyEqualShapesAreAdded() throws {
    var sum = try Tensor(shape: [2], values: [1, 2])
    try sum.add(try Tensor(shape: [2], values: [10, 20]))
    #expect(sum.values == [11, 22])
    let other = try Tensor(zeros: [2, 1])
    #expect(throws: WTConvError.self) { try sum.add(other) }
  }
}
