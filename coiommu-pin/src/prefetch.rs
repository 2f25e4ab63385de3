//! Bringing memory into the cache before it is needed, so that the misses of several blocks overlap.
//!
//! Unsafe is needed here for the instruction, which takes any address.
#![allow(unsafe_code)]

/// Asks for the cache lines of a value. Nothing waits for it, and nothing is read.
#[inline]
pub(crate) fn prefetch<T>(value: &T) {
    const LINE: usize = 64;
    let start = std::ptr::from_ref(value).cast::<i8>();
    // Not an iterator with steps, which would not be unrolled.
    let mut offset = 0;
    while offset < size_of::<T>() {
        line(start.wrapping_add(offset));
        offset += LINE;
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
fn line(address: *const i8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: the instruction is a hint: it changes nothing that a program can see, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address) }
}

/// Elsewhere the processor finds out by itself.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
#[inline]
fn line(_address: *const i8) {}
