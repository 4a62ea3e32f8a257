//! A copy whose stores go past the caches.

pub(crate) use imp::{copy, is_available};

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};

    /// Tells whether this processor has the instructions.
    pub(crate) fn is_available() -> bool {
        is_x86_feature_detected!("avx")
    }

    /// Copies all bytes; they are there for every processor and device when this returns.
    ///
    /// # Panics
    /// When the lengths differ, the target does not start on a multiple of 32, or [`is_available`] is false.
    pub(crate) fn copy(source: &[u8], target: &mut [u8]) {
        assert!(is_available());
        // SAFETY: the processor has AVX, as asserted.
        unsafe { copy_avx(source, target) }
    }

    #[target_feature(enable = "avx")]
    fn copy_avx(source: &[u8], target: &mut [u8]) {
        assert_eq!(source.len(), target.len());
        assert!(target.as_ptr().cast::<__m256i>().is_aligned());
        let (sources, source_rest) = source.as_chunks::<32>();
        let (targets, target_rest) = target.as_chunks_mut::<32>();
        for (source, target) in sources.iter().zip(targets) {
            // SAFETY: the chunk is 32 bytes that may be read; this load takes any address.
            let bytes = unsafe { _mm256_loadu_si256(source.as_ptr().cast()) };
            // SAFETY: the chunk is 32 bytes borrowed for writing, at a multiple of 32 bytes from an aligned start. Nobody reads
            // them before the fence below: the borrow lasts until this function returns.
            unsafe { _mm256_stream_si256(target.as_mut_ptr().cast(), bytes) };
        }
        // Non-temporal stores are not ordered with the stores by which the buffer is handed on.
        _mm_sfence();
        target_rest.copy_from_slice(source_rest);
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    pub(crate) fn is_available() -> bool {
        false
    }

    pub(crate) fn copy(_source: &[u8], _target: &mut [u8]) {
        unreachable!("not available here");
    }
}
