// Included first, and only by a .cpp file: lets the compiler fuse multiply and add from here on, which the build forbids
// elsewhere. For results that promise a bound, or chains of them; no other value may depend on it.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif
