// What WTConvCore uses of Apple's framework Metal, for machines that do not have it. Its kernels are
// those of wtconv.metal, which torch_bridge/wtconv/on_cpu built for the CPU.
//
// Declarations are Apple's, shortened; the page beside each is under
// https://developer.apple.com/documentation/metal/.
//
// Environment: FAKE_METAL is the library, and the source that it was built of lies beside it as
// FAKE_METAL.metal; unset, there is no device. FAKE_METAL_ORDER is the order of threads between two
// barriers, and FAKE_METAL_WITHOUT the number of a barrier that is not there.

@_exported import Foundation

// mtlsize
public struct MTLSize {
  public var width: Int, height: Int, depth: Int

  public init(width: Int, height: Int, depth: Int) {
    (self.width, self.height, self.depth) = (width, height, depth)
  }
}

// mtlresourceoptions
public struct MTLResourceOptions: OptionSet {
  public let rawValue: UInt

  public init(rawValue: UInt) { self.rawValue = rawValue }

  // mtlresourceoptions/storagemodeshared
  public static var storageModeShared: MTLResourceOptions { [] }
}

// mtlcompileoptions
open class MTLCompileOptions {
  public init() {}
}

// mtlbuffer
public protocol MTLBuffer: AnyObject {
  // mtlbuffer/length
  var length: Int { get }
  // mtlbuffer/contents()
  func contents() -> UnsafeMutableRawPointer
}

// mtlfunction
public protocol MTLFunction: AnyObject {}

// mtllibrary
public protocol MTLLibrary: AnyObject {
  // mtllibrary/makefunction(name:)
  func makeFunction(name functionName: String) -> (any MTLFunction)?
}

// mtlcomputepipelinestate
public protocol MTLComputePipelineState: AnyObject {
  // mtlcomputepipelinestate/maxtotalthreadsperthreadgroup
  var maxTotalThreadsPerThreadgroup: Int { get }
}

// mtlcomputecommandencoder
public protocol MTLComputeCommandEncoder: AnyObject {
  // mtlcomputecommandencoder/setcomputepipelinestate(_:)
  func setComputePipelineState(_ state: any MTLComputePipelineState)
  // mtlcomputecommandencoder/setbuffer(_:offset:index:)
  func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int)
  // mtlcomputecommandencoder/setbytes(_:length:index:)
  func setBytes(_ bytes: UnsafeRawPointer, length: Int, index: Int)
  // mtlcomputecommandencoder/dispatchthreadgroups(_:threadsperthreadgroup:)
  func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize)
  // mtlcommandencoder/endencoding()
  func endEncoding()
}

// mtlcommandbuffer
public protocol MTLCommandBuffer: AnyObject {
  // mtlcommandbuffer/makecomputecommandencoder()
  func makeComputeCommandEncoder() -> (any MTLComputeCommandEncoder)?
  // mtlcommandbuffer/commit()
  func commit()
  // mtlcommandbuffer/waituntilcompleted()
  func waitUntilCompleted()
  // mtlcommandbuffer/error
  var error: (any Error)? { get }
}

// mtlcommandqueue
public protocol MTLCommandQueue: AnyObject {
  // mtlcommandqueue/makecommandbuffer()
  func makeCommandBuffer() -> (any MTLCommandBuffer)?
}

// mtldevice
public protocol MTLDevice: AnyObject {
  // mtldevice/name
  var name: String { get }
  // mtldevice/makecommandqueue()
  func makeCommandQueue() -> (any MTLCommandQueue)?
  // mtldevice/makebuffer(length:options:)
  func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)?
  // mtldevice/makelibrary(source:options:)
  func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary
  // mtldevice/makecomputepipelinestate(function:)
  func makeComputePipelineState(function: any MTLFunction) throws -> any MTLComputePipelineState
}

// mtlcreatesystemdefaultdevice()
// swift-format-ignore: AlwaysUseLowerCamelCase
public func MTLCreateSystemDefaultDevice() -> (any MTLDevice)? {
  setting("FAKE_METAL").map(Device.init)
}

// MARK: - What the fake does

private func setting(_ name: String) -> String? { ProcessInfo.processInfo.environment[name] }

private struct Failure: LocalizedError {
  let errorDescription: String?

  init(_ text: String) { errorDescription = text }
}

/// Memory that is NaN when it is made, and ends the process where a kernel wrote beyond it.
private final class Buffer: MTLBuffer {
  static let guarded = 64
  let length: Int
  let start: UnsafeMutableRawPointer

  init(_ length: Int) {
    self.length = length
    start = .allocate(byteCount: length + Buffer.guarded, alignment: 256)
    start.initializeMemory(as: UInt8.self, repeating: 0xFF, count: length)
    (start + length).initializeMemory(as: UInt8.self, repeating: 0xA5, count: Buffer.guarded)
  }

  deinit { start.deallocate() }

  func contents() -> UnsafeMutableRawPointer { start }

  func check() {
    for i in 0..<Buffer.guarded {
      let byte = (start + length + i).load(as: UInt8.self)
      precondition(byte == 0xA5, "a kernel wrote beyond the end of a buffer")
    }
  }
}

private typealias Arguments = UnsafeMutablePointer<UnsafeMutableRawPointer?>

/// The library runs one kernel at a time.
private let running = NSLock()

/// A kernel, and what the library tells of it.
private final class Kernel: MTLFunction, MTLComputePipelineState {
  typealias Launch = @convention(c) (
    Arguments, UnsafePointer<UInt32>, UnsafePointer<UInt32>, UInt32, Int32
  ) -> Int32
  typealias Number = @convention(c) () -> Int32

  let launch: Launch
  let bytes: Int
  let maxTotalThreadsPerThreadgroup: Int

  init?(_ library: UnsafeMutableRawPointer, _ name: String) {
    guard let launch = dlsym(library, "\(name)_launch"),
      let bytes = dlsym(library, "\(name)_bytes"),
      let threads = dlsym(library, "\(name)_threads")
    else { return nil }
    self.launch = unsafeBitCast(launch, to: Launch.self)
    self.bytes = Int(unsafeBitCast(bytes, to: Number.self)())
    maxTotalThreadsPerThreadgroup = Int(unsafeBitCast(threads, to: Number.self)())
  }
}

private final class Library: MTLLibrary {
  let handle: UnsafeMutableRawPointer

  init(_ handle: UnsafeMutableRawPointer) { self.handle = handle }

  func makeFunction(name functionName: String) -> (any MTLFunction)? {
    Kernel(handle, functionName)
  }
}

private final class Encoder: MTLComputeCommandEncoder {
  private(set) var launches: [() -> Bool] = []
  private(set) var ended = false
  private var kernel: Kernel?
  private var arguments: [Int: Buffer] = [:]
  private var numbers: (index: Int, bytes: Buffer)?

  func setComputePipelineState(_ state: any MTLComputePipelineState) {
    kernel = (state as! Kernel)
  }

  func setBuffer(_ buffer: (any MTLBuffer)?, offset: Int, index: Int) {
    precondition(offset == 0, "the fake knows no offsets")
    arguments[index] = (buffer as! Buffer)
  }

  func setBytes(_ bytes: UnsafeRawPointer, length: Int, index: Int) {
    precondition(length <= 4096, "setBytes takes up to 4 KB")
    let copy = Buffer(length)
    copy.start.copyMemory(from: bytes, byteCount: length)
    numbers = (index, copy)
  }

  func dispatchThreadgroups(_ threadgroupsPerGrid: MTLSize, threadsPerThreadgroup: MTLSize) {
    guard let kernel, let numbers, !ended else { preconditionFailure("nothing to dispatch") }
    let threads = threadsPerThreadgroup
    precondition(
      threads.width * threads.height * threads.depth <= kernel.maxTotalThreadsPerThreadgroup,
      "too many threads in a threadgroup")
    precondition(numbers.bytes.length == kernel.bytes, "setBytes has not what the kernel takes")
    let buffers = (0..<numbers.index).map { index -> Buffer in
      guard let buffer = arguments[index] else { preconditionFailure("no buffer \(index)") }
      return buffer
    }
    let order = UInt32(setting("FAKE_METAL_ORDER") ?? "2")!
    let without = Int32(setting("FAKE_METAL_WITHOUT") ?? "0")!
    launches.append {
      var pointers: [UnsafeMutableRawPointer?] = (buffers + [numbers.bytes]).map(\.start)
      func sizes(_ size: MTLSize) -> [UInt32] {
        [size.width, size.height, size.depth].map(UInt32.init)
      }
      let failed = running.withLock {
        kernel.launch(&pointers, sizes(threadgroupsPerGrid), sizes(threads), order, without)
      }
      for buffer in buffers { buffer.check() }
      return failed == 0
    }
  }

  func endEncoding() { ended = true }
}

private final class CommandBuffer: MTLCommandBuffer {
  private let encoder = Encoder()
  private(set) var error: (any Error)?
  private var committed = false

  func makeComputeCommandEncoder() -> (any MTLComputeCommandEncoder)? { encoder }

  func commit() {
    precondition(encoder.ended, "commit comes after endEncoding")
    committed = true
  }

  func waitUntilCompleted() {
    precondition(committed, "waitUntilCompleted comes after commit")
    for launch in encoder.launches where !launch() {
      error = Failure("not all threads of a threadgroup reached a barrier")
    }
  }
}

private final class Device: MTLDevice, MTLCommandQueue {
  let name = "a fake"
  private let path: String

  init(_ path: String) { self.path = path }

  func makeCommandQueue() -> (any MTLCommandQueue)? { self }

  func makeCommandBuffer() -> (any MTLCommandBuffer)? { CommandBuffer() }

  func makeBuffer(length: Int, options: MTLResourceOptions) -> (any MTLBuffer)? {
    length > 0 ? Buffer(length) : nil
  }

  func makeLibrary(source: String, options: MTLCompileOptions?) throws -> any MTLLibrary {
    guard source == (try String(contentsOfFile: path + ".metal", encoding: .utf8)) else {
      throw Failure("this is not the source that \(path) was built of")
    }
    guard let handle = dlopen(path, RTLD_NOW) else { throw Failure(String(cString: dlerror())) }
    return Library(handle)
  }

  func makeComputePipelineState(function: any MTLFunction) throws -> any MTLComputePipelineState {
    function as! Kernel
  }
}
