//! A share as text, for people and for golden files.

use std::fmt;

use super::{Landing, Packed, Share};
use crate::plan::Steps;

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ranks")?;
        for rank in 0..self.size() {
            let promised = self.promised(rank);
            write!(
                f,
                "  {rank}  {} bytes: reads {} in {}, sends {}, receives {}, exchange memory {}",
                promised.payload_bytes,
                promised.read_bytes,
                promised.reads,
                promised.sent_bytes,
                promised.received_bytes,
                promised.exchange_bytes()
            )?;
            match promised.operations {
                0 => writeln!(f)?,
                count => writeln!(f, ", {count} operations, transient {}", promised.transient_bytes)?,
            }
        }
        for round in 0..self.round_count() {
            writeln!(f, "\nround {round}")?;
            for (rank, turn) in self.round(round).iter().enumerate() {
                write!(f, "  {rank}  r{}..r{}", turn.reads.start, turn.reads.end)?;
                match turn.after {
                    None => writeln!(f)?,
                    Some(round) => writeln!(f, " behind the operations of round {round}")?,
                }
                for packed in &turn.packed {
                    writeln!(f, "    {packed}")?;
                }
                for send in &turn.sends {
                    writeln!(f, "    s+{} {} -> {}", send.offset_bytes, send.len_bytes, send.peer)?;
                }
                for receive in &turn.receives {
                    write!(f, "    {} -> ", receive.peer)?;
                    match receive.landing {
                        Landing::InPlace(place) => write!(f, "a{}+{}", place.arena, place.offset_bytes)?,
                        Landing::Buffered(offset_bytes) => write!(f, "b+{offset_bytes}")?,
                    }
                    writeln!(f, "  {}", receive.len_bytes)?;
                }
                for copy in &turn.unpacked {
                    let Steps { count, target_stride_bytes, .. } = copy.steps;
                    write!(f, "    b+{}  ", copy.source_offset_bytes)?;
                    if !copy.steps.is_once() {
                        write!(f, "{count} x ")?;
                    }
                    write!(f, "{} -> a{}+{}", copy.len_bytes, copy.target.arena, copy.target.offset_bytes)?;
                    if !copy.steps.is_once() {
                        write!(f, "  every {target_stride_bytes}")?;
                    }
                    writeln!(f)?;
                }
                for operation in &turn.operations {
                    writeln!(f, "    o{operation}")?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}+{}  ", self.read, self.source_offset_bytes)?;
        match self.piece_count {
            1 => write!(f, "{}", self.piece_len_bytes)?,
            count => write!(f, "{count} x {} every {}", self.piece_len_bytes, self.source_stride_bytes)?,
        }
        write!(f, " -> s+{}", self.offset_bytes)
    }
}
