import Testing

@testable import WTConvCore

#if canImport(Metal) && canImport(CoreML)
import Metal
#endif

/// Sizes even and odd at every depth, of one and of several threadgroups.
let cascades: [(height: Int, width: Int, levels: Int)] = [
  (2, 2, 1), (1, 1, 2), (7, 9, 2), (28, 28, 4), (14, 33, 3), (70, 37, 5), (64, 40, 6), (3, 66, 7),
]

func image(_ height: Int, _ width: Int, channels: Int = 3) throws -> Tensor {
  try .formula(channels: channels, height: height, width: width)
}

func largestDifference(_ a: Tensor, _ b: Tensor) -> Float {
  guard a.shape == b.shape else { return .infinity }
  // NaN, which is no maximum, must show.
  return zip(a.values, b.values).reduce(0) { largest, pair in
    let difference = abs(pair.0 - pair.1)
    return difference <= largest ? largest : difference.isNaN ? .infinity : difference
  }
}

@Suite struct HaarTests {
  let haar = CPUHaarRunner()

  @Test func subbandsComeInTheirOrder() throws {
    let block = try Tensor(shape: [1, 1, 2, 2], values: [1, 2, 4, 8])
    #expect(try haar.forward(block, levels: 1)[0].values == [7.5, -4.5, -2.5, 1.5])
  }

  @Test func oddSizesArePaddedWithZeros() throws {
    let bands = try haar.forward(try Tensor(shape: [1, 1, 1, 1], values: [4]), levels: 2)
    #expect(bands.map(\.values) == [[2, 2, 2, 2], [1, 1, 1, 1]])
  }

  @Test func channelsStayApart() throws {
    let pixels = try image(6, 10, channels: 2)
    let both = try haar.forward(pixels, levels: 2)
    let second = try haar.forward(
      try Tensor(shape: [1, 1, 6, 10], values: Array(pixels.values[60...])), levels: 2)
    #expect(Array(both[1].values[24...]) == second[1].values)
  }

  @Test(arguments: cascades)
  func theInverseUndoesTheCascade(height: Int, width: Int, levels: Int) throws {
    let pixels = try image(height, width)
    let bands = try haar.forward(pixels, levels: levels)
    #expect(bands.count == levels)
    let back = try haar.inverse(bands, height: height, width: width)
    #expect(largestDifference(back, pixels) < 1e-6)
  }

  @Test func theSynthesisAddsEveryLowBand() throws {
    // Bands of zeros but for a low band at level 1 and one at level 2.
    var first = try Tensor(zeros: [1, 4, 2, 2])
    first.values[0] = 2
    var second = try Tensor(zeros: [1, 4, 1, 1])
    second.values[0] = 8
    let sum = try haar.synthesis([first, second], height: 4, width: 4)
    #expect(sum.values == [3, 3, 2, 2, 3, 3, 2, 2] + [Float](repeating: 2, count: 8))
  }

  @Test func bandsThatDoNotFitAreErrors() throws {
    let bands = try haar.forward(try image(6, 10), levels: 2)
    #expect(throws: WTConvError.self) { try haar.inverse(bands, height: 4, width: 10) }
    #expect(throws: WTConvError.self) { try haar.inverse(bands.reversed(), height: 6, width: 10) }
    #expect(throws: WTConvError.self) { try haar.inverse([], height: 6, width: 10) }
    #expect(throws: WTConvError.self) { try haar.synthesis([], height: 6, width: 10) }
    #expect(throws: WTConvError.self) { try haar.forward(try image(6, 10), levels: -1) }
    let flat = try Tensor(zeros: [6, 10])
    #expect(throws: WTConvError.self) { try haar.forward(flat, levels: 1) }
  }
}

#if canImport(Metal) && canImport(CoreML)
let hasMetal = MTLCreateSystemDefaultDevice() != nil

@Suite(.enabled(if: hasMetal, "this machine has no Metal device"))
struct MetalTests {
  @Test(arguments: cascades)
  func metalEqualsTheCPU(height: Int, width: Int, levels: Int) throws {
    let metal = try MetalHaarRunner()
    let cpu = CPUHaarRunner()
    let pixels = try image(height, width)
    let bands = try metal.forward(pixels, levels: levels)
    let expected = try cpu.forward(pixels, levels: levels)
    for (found, right) in zip(bands, expected) { #expect(largestDifference(found, right) < 1e-6) }
    #expect(bands.count == levels)
    let back = try metal.inverse(expected, height: height, width: width)
    #expect(largestDifference(back, pixels) < 1e-6)
    let sum = try metal.synthesis(expected, height: height, width: width)
    let right = try cpu.synthesis(expected, height: height, width: width)
    #expect(largestDifference(sum, right) < 1e-5)
  }
}
#endif
