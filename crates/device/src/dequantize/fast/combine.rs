//! Values combined with numbers, in loops that the compiler vectorizes.

/// What is done with a number.
#[derive(Clone, Copy)]
pub(super) enum Operation {
    Subtract,
    Multiply,
    Add,
}

/// All values with one number.
#[inline(always)]
pub(super) fn combine_one(operation: Operation, values: &mut [f32], number: f32) {
    match operation {
        Operation::Subtract => values.iter_mut().for_each(|v| *v -= number),
        Operation::Multiply => values.iter_mut().for_each(|v| *v *= number),
        Operation::Add => values.iter_mut().for_each(|v| *v += number),
    }
}

/// Each value with a number of its own.
#[inline(always)]
pub(super) fn combine_each(operation: Operation, values: &mut [f32], numbers: impl Iterator<Item = f32>) {
    let pairs = values.iter_mut().zip(numbers);
    match operation {
        Operation::Subtract => pairs.for_each(|(v, number)| *v -= number),
        Operation::Multiply => pairs.for_each(|(v, number)| *v *= number),
        Operation::Add => pairs.for_each(|(v, number)| *v += number),
    }
}

/// Runs of values that share a number: the first `first_len`, then `run_len` each.
#[inline(always)]
pub(super) fn combine_runs(
    operation: Operation,
    values: &mut [f32],
    mut numbers: impl Iterator<Item = f32>,
    first_len: usize,
    run_len: usize,
) {
    let (first, rest) = values.split_at_mut(first_len.min(values.len()));
    if let Some(number) = numbers.next() {
        combine_one(operation, first, number);
    }
    match run_len {
        // The short groups of the MX formats: of a length that is known, so without a loop's start and end.
        16 => combine_short::<16>(operation, rest, numbers),
        32 => combine_short::<32>(operation, rest, numbers),
        _ => rest
            .chunks_mut(run_len)
            .zip(numbers)
            .for_each(|(run, number)| combine_one(operation, run, number)),
    }
}

#[inline(always)]
fn combine_short<const LEN: usize>(
    operation: Operation,
    values: &mut [f32],
    mut numbers: impl Iterator<Item = f32>,
) {
    let (runs, rest) = values.as_chunks_mut::<LEN>();
    let pairs = runs.iter_mut().zip(numbers.by_ref());
    match operation {
        Operation::Subtract => pairs.for_each(|(run, number)| *run = run.map(|v| v - number)),
        Operation::Multiply => pairs.for_each(|(run, number)| *run = run.map(|v| v * number)),
        Operation::Add => pairs.for_each(|(run, number)| *run = run.map(|v| v + number)),
    }
    if let Some(number) = numbers.next() {
        combine_one(operation, rest, number);
    }
}
