import Testing

@testable import WTConvCore

@Suite struct ConvolutionTests {
  /// The definition, a pixel at a time.
  func plain(_ image: Tensor, taps: Tensor) throws -> Tensor {
    var sums = image
    let (height, width, k) = (image.shape[2], image.shape[3], taps.shape[2])
    let before = (k - 1) / 2
    for p in 0..<image.shape[1] {
      for row in 0..<height {
        for column in 0..<width {
          var sum: Float = 0
          for i in 0..<k {
            for j in 0..<k {
              let (y, x) = (row + i - before, column + j - before)
              guard 0..<height ~= y, 0..<width ~= x else { continue }
              sum += taps.values[(p * k + i) * k + j] * image.values[(p * height + y) * width + x]
            }
          }
          sums.values[(p * height + row) * width + column] = sum
        }
      }
    }
    return sums
  }

  @Test(arguments: [1, 2, 3, 4, 5, 9], [(1, 1), (7, 4), (12, 12)])
  func depthwiseIsItsDefinition(k: Int, size: (Int, Int)) throws {
    let pixels = try image(size.0, size.1, channels: 2)
    let taps = try Tensor(
      shape: [2, 1, k, k], values: Tensor.formula(channels: 2, height: k, width: k).values)
    let found = try CPUConvolutionRunner.Depthwise(taps: taps)(pixels)
    #expect(largestDifference(found, try plain(pixels, taps: taps)) < 1e-5)
  }

  @Test func theBiasIsItsChannels() throws {
    let taps = try Tensor(zeros: [2, 1, 3, 3])
    let convolution = try CPUConvolutionRunner.Depthwise(taps: taps, bias: [3, 5])
    #expect(try convolution(try Tensor(zeros: [1, 2, 1, 2])).values == [3, 3, 5, 5])
  }

  @Test func shapesThatDoNotFitAreErrors() throws {
    let taps = try Tensor(zeros: [2, 1, 3, 3])
    let convolution = try CPUConvolutionRunner.Depthwise(taps: taps)
    #expect(throws: WTConvError.self) { try convolution(try Tensor(zeros: [1, 3, 4, 4])) }
    #expect(throws: WTConvError.self) {
      try CPUConvolutionRunner.Depthwise(taps: taps, bias: [1])
    }
    let wide = try Tensor(zeros: [2, 1, 3, 5])
    #expect(throws: WTConvError.self) { try CPUConvolutionRunner.Depthwise(taps: wide) }
    let runner = CPUConvolutionRunner(base: convolution, levels: [])
    let pixels = try Tensor(zeros: [1, 2, 4, 4])
    #expect(throws: WTConvError.self) { try runner.convolve(pixels, bands: [pixels]) }
  }

  @Test func aLayerIsItsParts() throws {
    // Convolutions that change nothing: the base branch gives x, the other one x again.
    func identity(_ channels: Int) throws -> CPUConvolutionRunner.Depthwise {
      let ones = [Float](repeating: 1, count: channels)
      return try .init(taps: Tensor(shape: [channels, 1, 1, 1], values: ones))
    }
    let runner = CPUConvolutionRunner(base: try identity(3), levels: [try identity(12)])
    let layer = WTConvLayer(haar: CPUHaarRunner(), convolutions: runner, levels: 1)
    let pixels = try image(5, 6)
    var twice = pixels
    try twice.add(pixels)
    #expect(largestDifference(try layer(pixels), twice) < 1e-6)
  }
}
