//! Results of driver functions, as cuda.h numbers them.

/// What a function of the driver ends in.
pub(crate) type Result<T = ()> = std::result::Result<T, i32>;

pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const NOT_INITIALIZED: i32 = 3;
pub(crate) const NO_DEVICE: i32 = 100;
pub(crate) const INVALID_DEVICE: i32 = 101;
pub(crate) const INVALID_CONTEXT: i32 = 201;
pub(crate) const NO_BINARY: i32 = 209;
pub(crate) const PEER_ACCESS_UNSUPPORTED: i32 = 217;
pub(crate) const INVALID_PTX: i32 = 218;
pub(crate) const INVALID_HANDLE: i32 = 400;
pub(crate) const NOT_FOUND: i32 = 500;
pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
pub(crate) const PEER_ACCESS_ALREADY_ENABLED: i32 = 704;
pub(crate) const CONTEXT_IS_DESTROYED: i32 = 709;
pub(crate) const MISALIGNED_ADDRESS: i32 = 716;
pub(crate) const LAUNCH_FAILED: i32 = 719;
pub(crate) const NOT_SUPPORTED: i32 = 801;
pub(crate) const CAPTURE_UNSUPPORTED: i32 = 900;
pub(crate) const CAPTURE_INVALIDATED: i32 = 901;
pub(crate) const CAPTURE_UNMATCHED: i32 = 903;
pub(crate) const CAPTURE_UNJOINED: i32 = 904;
pub(crate) const CAPTURE_ISOLATION: i32 = 905;
pub(crate) const CAPTURE_IMPLICIT: i32 = 906;

/// Errors after which a context gives nothing but that error.
pub(crate) fn is_sticky(code: i32) -> bool {
    matches!(code, 214 | 220 | ILLEGAL_ADDRESS | 702 | 710 | 714..=719)
}

/// The names that users see, each ended by a NUL.
const NAMES: [(i32, &str); 32] = [
    (0, "CUDA_SUCCESS\0"),
    (INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE\0"),
    (OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY\0"),
    (NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED\0"),
    (4, "CUDA_ERROR_DEINITIALIZED\0"),
    (NO_DEVICE, "CUDA_ERROR_NO_DEVICE\0"),
    (INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE\0"),
    (INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT\0"),
    (NO_BINARY, "CUDA_ERROR_NO_BINARY_FOR_GPU\0"),
    (214, "CUDA_ERROR_ECC_UNCORRECTABLE\0"),
    (PEER_ACCESS_UNSUPPORTED, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED\0"),
    (INVALID_PTX, "CUDA_ERROR_INVALID_PTX\0"),
    (222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION\0"),
    (304, "CUDA_ERROR_OPERATING_SYSTEM\0"),
    (INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE\0"),
    (NOT_FOUND, "CUDA_ERROR_NOT_FOUND\0"),
    (ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS\0"),
    (701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES\0"),
    (702, "CUDA_ERROR_LAUNCH_TIMEOUT\0"),
    (PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED\0"),
    (CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED\0"),
    (711, "CUDA_ERROR_TOO_MANY_PEERS\0"),
    (MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS\0"),
    (LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED\0"),
    (800, "CUDA_ERROR_NOT_PERMITTED\0"),
    (NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED\0"),
    (CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED\0"),
    (CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED\0"),
    (CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED\0"),
    (CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION\0"),
    (CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT\0"),
    (999, "CUDA_ERROR_UNKNOWN\0"),
];

/// The driver's name of a code.
pub(crate) fn name(code: i32) -> Option<&'static str> {
    NAMES.iter().find(|(known, _)| *known == code).map(|(_, name)| *name)
}
