// The parameters of kernels that all levels have one of, for NVRTC.
//
// The host defines this macro:
//   LEVELS           the number of levels, at most 5

// What `of` makes of the number of each level.
#if LEVELS == 1
#define EACH(of) of(0)
#elif LEVELS == 2
#define EACH(of) of(0), of(1)
#elif LEVELS == 3
#define EACH(of) of(0), of(1), of(2)
#elif LEVELS == 4
#define EACH(of) of(0), of(1), of(2), of(3)
#else
#define EACH(of) of(0), of(1), of(2), of(3), of(4)
#endif
