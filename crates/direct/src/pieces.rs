//! How much of an extent one call is asked for.

use tensorhaul_device::STORAGE_ALIGN_BYTES;
use tensorhaul_io::ReadCause;
use tensorhaul_plan::Extent;

use crate::vendor::Vendor;

/// What one call is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) len_bytes: u64,
    /// Whether it is the last, partial page, which goes through the host.
    pub(crate) is_tail: bool,
}

/// Returns what to ask for next of an extent of which so much is there; `None` when all of it is.
pub(crate) fn next_piece(vendor: Vendor, extent: Extent, have: u64) -> Option<Piece> {
    let rest = extent.len_bytes - have;
    let len_bytes = rest.min(CALL_LEN_BYTES_MAX);
    let whole_pages = len_bytes - len_bytes % STORAGE_ALIGN_BYTES;
    match vendor {
        _ if rest == 0 => None,
        // cuFile brings the last, partial page through a page of its own.
        Vendor::Nvidia => Some(Piece { len_bytes, is_tail: false }),
        // The kernel's part of hipFile takes whole pages only.
        Vendor::Amd if whole_pages == 0 => Some(Piece { len_bytes, is_tail: true }),
        Vendor::Amd => Some(Piece { len_bytes: whole_pages, is_tail: false }),
    }
}

/// Returns where to go on when a call brought less than was asked for: for hipFile, at a page, which may be read again.
pub(crate) fn resume_at(vendor: Vendor, end: u64, before: u64) -> Result<u64, ReadCause> {
    let at = match vendor {
        Vendor::Nvidia => end,
        Vendor::Amd => end - end % STORAGE_ALIGN_BYTES,
    };
    if at > before {
        return Ok(at);
    }
    Err(ReadCause::Library(format!("{} bytes came, less than a page", end - before).into()))
}

/// The most that hipFile reads in one call, and the system in one of its own: `MAX_RW_COUNT` of Linux.
const CALL_LEN_BYTES_MAX: u64 = 0x7fff_f000;
const _: () = assert!(CALL_LEN_BYTES_MAX.is_multiple_of(STORAGE_ALIGN_BYTES));

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for an extent as if every call brought all that it was asked for.
    fn pieces(vendor: Vendor, len_bytes: u64) -> Vec<Piece> {
        let extent = Extent { file: 0, offset_bytes: 0, len_bytes };
        let (mut have, mut pieces) = (0, Vec::new());
        while let Some(piece) = next_piece(vendor, extent, have) {
            have += piece.len_bytes;
            pieces.push(piece);
        }
        assert_eq!(have, len_bytes);
        pieces
    }

    #[test]
    fn every_call_stays_under_2_gib_and_begins_at_a_page() {
        for vendor in [Vendor::Nvidia, Vendor::Amd] {
            for len_bytes in [1, 4096, 0x7fff_efff, 0x7fff_f000, 0x7fff_f001, 1 << 31, (5 << 30) + 77] {
                let mut at_bytes = 0;
                for piece in pieces(vendor, len_bytes) {
                    assert!(piece.len_bytes < 1 << 31, "{vendor:?} {len_bytes}: {piece:?}");
                    assert!(at_bytes % 4096 == 0, "{vendor:?} {len_bytes}: {piece:?}");
                    at_bytes += piece.len_bytes;
                }
            }
        }
    }

    #[test]
    fn only_amds_last_partial_page_goes_through_the_host() {
        let tails = |vendor, len_bytes| {
            let tails = pieces(vendor, len_bytes).into_iter().filter(|piece| piece.is_tail);
            tails.map(|piece| piece.len_bytes).collect::<Vec<_>>()
        };
        assert_eq!(tails(Vendor::Amd, 8192 + 5), [5]);
        assert_eq!(tails(Vendor::Amd, 8192), [0; 0]);
        assert_eq!(tails(Vendor::Nvidia, 8192 + 5), [0; 0]);
    }

    #[test]
    fn a_short_read_goes_on_where_it_ended_or_at_its_page() {
        assert!(matches!(resume_at(Vendor::Nvidia, 9000, 4096), Ok(9000)));
        assert!(matches!(resume_at(Vendor::Amd, 9000, 4096), Ok(8192)));
        assert!(resume_at(Vendor::Amd, 8000, 4096).is_err(), "the same page would be asked for for ever");
    }
}
