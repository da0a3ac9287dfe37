// swift-tools-version: 6.0

import PackageDescription

let package = Package(
  name: "WTConvCoreML",
  platforms: [.macOS(.v13), .iOS(.v16)],
  products: [
    .library(name: "WTConvCore", targets: ["WTConvCore"]),
    .executable(name: "WTConvCoreMLRunner", targets: ["WTConvCoreMLRunner"]),
  ],
  targets: [
    // Copied, not processed: Xcode would compile it, and the runner compiles it on the device.
    .target(name: "WTConvCore", resources: [.copy("Resources/wtconv.metal")]),
    .executableTarget(name: "WTConvCoreMLRunner", dependencies: ["WTConvCore"]),
    .testTarget(name: "WTConvCoreTests", dependencies: ["WTConvCore"]),
  ]
)
