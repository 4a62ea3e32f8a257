//! Promises about operations: what the device computes is what the host's plain loops compute, bit for bit.

use std::sync::Arc;

use tensorhaul_plan::Dtype;

use super::{expect, pattern, read, text, with_staged, write};
use crate::cast::cast;
use crate::contract::{Allocation, Device, Piece, Stream};
use crate::operation::{Cast, Location, Operation, OperationKind, Strided};

pub(super) fn operations_are_prepared_once(device: &dyn Device) -> Result<(), String> {
    for kind in [OperationKind::Cast, OperationKind::Strided, OperationKind::Dequantize] {
        device.prepare(kind).map_err(text)?;
        let again = device.prepare(kind).map_err(text)?;
        expect(again.is_zero(), || format!("{kind} took {again:?} the second time"))?;
    }
    Ok(())
}

pub(super) fn casts_round_as_the_host(device: &dyn Device) -> Result<(), String> {
    for source_dtype in SOURCES {
        let elements = samples(source_dtype);
        let numel = elements.len() / width_of(source_dtype);
        let source = device.allocate(elements.len() as u64).map_err(text)?;
        write(device, &elements, &source, 0)?;
        for (number, target_dtype) in TARGETS.into_iter().enumerate() {
            let whole = [CastCase { source_offset: 0, target_offset: 0, numel }];
            let stream = STREAMS[number % 2];
            check_casts(device, (source_dtype, &elements, &source), target_dtype, &whole, stream)?;
        }
    }
    Ok(())
}

pub(super) fn casts_start_and_end_anywhere(device: &dyn Device) -> Result<(), String> {
    for source_dtype in SOURCES {
        let mut elements = samples(source_dtype);
        elements.truncate(4096);
        elements.extend(pattern(29, 4096));
        let source = device.allocate(elements.len() as u64).map_err(text)?;
        write(device, &elements, &source, 0)?;
        for target_dtype in TARGETS {
            let (mut cases, mut behind) = (Vec::new(), 0usize);
            for (at, numel) in [0, 1, 7, 8, 9, 31, 250].into_iter().enumerate() {
                // From and to multiples of 16, then of the element only, then any byte.
                for (from, to) in
                    [(0, 0), (width_of(source_dtype), 0), (0, width_of(target_dtype)), (48, 16), (at, 3 * at)]
                {
                    let target_offset = behind.next_multiple_of(64) + to;
                    cases.push(CastCase { source_offset: 16 * at + from, target_offset, numel });
                    behind = target_offset + numel * width_of(target_dtype) + 1;
                }
            }
            let stream = STREAMS[cases.len() % 2];
            check_casts(device, (source_dtype, &elements, &source), target_dtype, &cases, stream)?;
        }
    }
    Ok(())
}

pub(super) fn strided_copies_on_the_device_keep_their_pieces(device: &dyn Device) -> Result<(), String> {
    let sent = pattern(17, 1 << 16);
    let source = device.allocate(sent.len() as u64).map_err(text)?;
    write(device, &sent, &source, 0)?;
    let shapes = [(0, 5), (1, 300), (2, 1), (5, 20), (6, 700), (16, 100), (47, 90), (1000, 13), (40_000, 1)];
    for (number, (len, count)) in shapes.into_iter().enumerate() {
        let (mut cases, mut expected) = (Vec::new(), Vec::new());
        for (source_gap, target_gap) in [(0, 0), (1, 0), (16, 3), (13, 16)] {
            for (from, to) in [(0, 0), (3, 0), (0, 5), (7, 23), (9, 9)] {
                let (source_stride, target_stride) = (len + source_gap, len + target_gap);
                let target_offset = expected.len().next_multiple_of(64) + to;
                expected.resize(target_offset + count * target_stride + GUARD_LEN, GUARD);
                for piece in 0..count {
                    let bytes = &sent[from + piece * source_stride..][..len];
                    expected[target_offset + piece * target_stride..][..len].copy_from_slice(bytes);
                }
                cases.push((from, target_offset, source_stride, target_stride));
            }
        }
        let target = guarded(device, expected.len())?;
        let operations: Vec<_> = cases
            .iter()
            .map(|&(from, to, source_stride, target_stride)| {
                Operation::Strided(Strided {
                    source: Location { allocation: &source, offset_bytes: from as u64 },
                    source_stride_bytes: source_stride as u64,
                    target: Location { allocation: &target, offset_bytes: to as u64 },
                    target_stride_bytes: target_stride as u64,
                    piece_len_bytes: len as u64,
                    piece_count: count as u64,
                })
            })
            .collect();
        run(device, &operations, &target, &expected, STREAMS[number % 2])
            .map_err(|what| format!("{count} pieces of {len} bytes: {what}; from, to, strides: {cases:?}"))?;
    }
    Ok(())
}

pub(super) fn many_small_pieces_land(device: &dyn Device) -> Result<(), String> {
    let sent = pattern(23, 1 << 16);
    for longest in [5, 40, 200] {
        let first = device.allocate(1 << 16).map_err(text)?;
        let second = device.allocate(1 << 16).map_err(text)?;
        let mut expected = [vec![GUARD; 1 << 16], vec![GUARD; 1 << 16]];
        for target in [&first, &second] {
            write(device, &expected[0], target, 0)?;
        }
        let (mut pieces, mut from, mut to) = (Vec::new(), 3, 1);
        for number in 0..300 {
            let len_bytes = number * 7 % (longest + 1);
            let target = if number % 3 == 0 { &first } else { &second };
            pieces.push(Piece {
                source_offset_bytes: from,
                len_bytes,
                target,
                target_offset_bytes: to as u64,
            });
            let expected = &mut expected[usize::from(number % 3 != 0)];
            expected[to..to + len_bytes].copy_from_slice(&sent[from..from + len_bytes]);
            from += len_bytes + number % 5;
            to += len_bytes + number % 4;
        }
        with_staged(device, &sent, |bytes| {
            // SAFETY: `with_staged` keeps the bytes until the stream is done; the targets outlive it.
            unsafe { device.copy_pieces(bytes, &pieces, Stream::Copy) }
        })?;
        for (target, expected) in [&first, &second].into_iter().zip(&expected) {
            let back = read(device, target, 0, 1 << 16)?;
            expect(back == *expected, || {
                let at = back.iter().zip(expected).position(|(found, expected)| found != expected);
                format!("pieces of up to {longest} bytes: byte {at:?} differs")
            })?;
        }
    }
    Ok(())
}

/// Where one cast starts and ends.
#[derive(Debug)]
struct CastCase {
    source_offset: usize,
    target_offset: usize,
    numel: usize,
}

/// Casts on the device, and compares with the host's loop and with what was around the targets.
fn check_casts(
    device: &dyn Device,
    (source_dtype, elements, source): (Dtype, &[u8], &Arc<dyn Allocation>),
    target_dtype: Dtype,
    cases: &[CastCase],
    stream: Stream,
) -> Result<(), String> {
    let mut expected = Vec::new();
    for case in cases {
        let source_len = case.numel * width_of(source_dtype);
        let target_len = case.numel * width_of(target_dtype);
        expected.resize(expected.len().max(case.target_offset + target_len + GUARD_LEN), GUARD);
        let source = &elements[case.source_offset..][..source_len];
        cast(source_dtype, source, target_dtype, &mut expected[case.target_offset..][..target_len]);
    }
    let target = guarded(device, expected.len())?;
    let operations: Vec<_> = cases
        .iter()
        .map(|case| {
            Operation::Cast(Cast {
                source: Location { allocation: source, offset_bytes: case.source_offset as u64 },
                source_dtype,
                target: Location { allocation: &target, offset_bytes: case.target_offset as u64 },
                target_dtype,
                numel: case.numel as u64,
            })
        })
        .collect();
    run(device, &operations, &target, &expected, stream)
        .map_err(|what| format!("{source_dtype} to {target_dtype} on {stream:?}: {what}; {cases:?}"))
}

/// Runs operations and compares what their common target's allocation then holds.
fn run(
    device: &dyn Device,
    operations: &[Operation<'_>],
    target: &Arc<dyn Allocation>,
    expected: &[u8],
    stream: Stream,
) -> Result<(), String> {
    let found = run_and_read(device, operations, target, expected.len(), stream)?;
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
    at.map_or(Ok(()), |at| Err(format!("byte {at} is {:#04x} instead of {:#04x}", found[at], expected[at])))
}

/// Runs operations and returns what their common target's allocation then holds.
pub(super) fn run_and_read(
    device: &dyn Device,
    operations: &[Operation<'_>],
    target: &Arc<dyn Allocation>,
    len: usize,
    stream: Stream,
) -> Result<Vec<u8>, String> {
    for operation in operations {
        // SAFETY: the allocations live until the event was waited for, and nobody else touches them.
        unsafe { device.run(operation, stream) }.map_err(text)?;
    }
    let event = device.record(stream).map_err(text)?;
    device.wait(&event).map_err(text)?;
    read(device, target, 0, len)
}

/// Allocates memory that shows where nobody wrote.
pub(super) fn guarded(device: &dyn Device, len: usize) -> Result<Arc<dyn Allocation>, String> {
    let target = device.allocate(len as u64).map_err(text)?;
    write(device, &vec![GUARD; len], &target, 0)?;
    Ok(target)
}

/// Elements that try a type: every code of one and two bytes; of wider ones every value of two bytes with its
/// neighbours, half ways, and bits at random.
fn samples(dtype: Dtype) -> Vec<u8> {
    match width_of(dtype) {
        1 => (0..=u8::MAX).collect(),
        2 => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
        width => {
            let wide = |source| {
                let (source_bytes, mut target) = (samples(source), vec![0; width << 16]);
                cast(source, &source_bytes, dtype, &mut target);
                target
            };
            let mut all = [wide(Dtype::F16), wide(Dtype::Bf16)].concat();
            let exact = all.clone();
            for (number, element) in exact.chunks(width).enumerate() {
                // The lowest byte alone makes the next number; the middle ones make half ways of both types.
                for (byte, bit) in [(0, 1), (width / 2 - 1, 0x10), (width / 2 - 1, 0x80), (width / 2, 0x08)] {
                    if number % 4 == byte % 4 || number < 64 {
                        let mut near = element.to_vec();
                        near[byte] ^= bit;
                        all.extend_from_slice(&near);
                    }
                }
            }
            all.extend(pattern(3, width << 14));
            all
        }
    }
}

fn width_of(dtype: Dtype) -> usize {
    dtype.bits() as usize / 8
}

const SOURCES: [Dtype; 9] = [
    Dtype::F8E5m2,
    Dtype::F8E4m3,
    Dtype::F8E8m0,
    Dtype::F8E4m3Fnuz,
    Dtype::F8E5m2Fnuz,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::F32,
    Dtype::F64,
];

const TARGETS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16];

pub(super) const STREAMS: [Stream; 2] = [Stream::Copy, Stream::Compute];

pub(super) const GUARD: u8 = 0xee;
pub(super) const GUARD_LEN: usize = 33;
