//! The execution of a recipe that loads call: lines of codes that stay in the first-level cache, on several threads.
//!
//! The target is cut into units, stretches of it that threads take in turn. A unit is done line by line, a line in passes over
//! its elements, each a simple loop:
//!
//! ```text
//! payload --unpack--> codes (u8) --widen--> numbers (f32) --combine, once a step--> numbers (f32) --round--> target
//! ```
//!
//! Codes are unpacked along the index whose codes are neighbours in the file. Where that is not the target's, a square of codes
//! is turned before it is widened, while they are bytes: what follows is always along the target's lines.
//!
//! Every pass computes what the [reference](super::reference) does, in the same order, in F32. Differences of integers are
//! taken in F32 too: both sides are below 2^24, so they are exact.

mod combine;
mod numbers;
mod turn;
mod unpack;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{Element, Grid, Recipe, Role, ZeroPoint};

use self::combine::{Operation, combine_each, combine_one, combine_runs};
use self::numbers::{Line, Numbers};
use self::turn::turn;
use self::unpack::{Packed, has_column_lines};
use super::reference::{element, float, matrix, sign_extended};
use super::{Layout, Output, Sources, check};
use crate::float::{f32_to_bf16, f32_to_f16};

/// Writes a quantized tensor's numbers, `[batch, rows, cols]` or each matrix transposed.
///
/// Numbers are computed in F32, in the order that [`Recipe`]'s module gives, and rounded once to the output's dtype, to
/// nearest, ties to even. NaN stays NaN, infinities stay infinite, and what is too large becomes infinite; subnormal numbers
/// are kept. The result does not depend on `thread_count`, and is that of the [reference](super::reference) in every bit, except
/// that the payloads of NaN may differ.
///
/// At most `thread_count` threads work, the caller's among them, and fewer where there is too little to do. Each needs some
/// 50 KiB, and up to 1 KiB for each group of columns and each kind of number that codes are combined with. The cheaper layout is
/// `Columns` where the recipe [is column-major](Recipe::is_column_major), `Rows` else: the other costs about twice as much.
///
/// Two layouts are unpacked code by code, an order of magnitude slower: padded words of 3, 5, 6 or 7 bits, and AWQ's tiles
/// of 4 by 64.
///
/// # Panics
/// When a source is shorter than [`Recipe::source_len_bytes`], the target is not of [`Recipe::target_len_bytes`], or the output's
/// dtype is not F32, F16 or BF16.
pub fn dequantize(
    recipe: &Recipe,
    sources: &Sources<'_>,
    output: Output,
    target: &mut [u8],
    thread_count: usize,
) {
    check(recipe, sources, output, target);
    if target.is_empty() {
        return;
    }
    let job = Job::new(recipe, sources, output.layout);
    match output.dtype {
        Dtype::F32 => job.run(target, thread_count, f32::to_le_bytes),
        Dtype::F16 => job.run(target, thread_count, |value| f32_to_f16(value).to_le_bytes()),
        _ => job.run(target, thread_count, |value| f32_to_bf16(value).to_le_bytes()),
    }
}

/// What all threads share: the recipe, prepared.
struct Job<'a> {
    packed: Packed<'a>,
    rows: usize,
    cols: usize,
    batch: usize,
    is_column_lines: bool,
    layout: Layout,
    widen: Widen,
    steps: Vec<Step<'a>>,
    group_count: usize,
    group_index: Option<Vec<u32>>,
}

/// How codes become numbers.
enum Widen {
    /// The code less a zero-point.
    Unsigned(i32),
    /// By the number that each code stands for.
    Table(Box<[f32; 256]>),
}

/// What is done to numbers, in the recipe's order.
enum Step<'a> {
    Numbers(Operation, Numbers<'a>),
    Factor(f32),
    Fold(Vec<f32>),
}

/// Elements of the target, and which they are.
struct Unit<'t, const B: usize> {
    e: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    target: &'t mut [[u8; B]],
}

impl<'a> Job<'a> {
    fn new(recipe: &'a Recipe, sources: &'a Sources<'a>, layout: Layout) -> Job<'a> {
        let of_grid = |grid: Grid, role| Numbers::of_grid(recipe, sources, grid, role);
        let zero_points = match recipe.zero_point {
            ZeroPoint::Float(grid) => Some(of_grid(grid, Role::ZeroPoint)),
            _ => Numbers::of_zero_points(recipe, sources),
        };
        let scales = recipe.scale.map(|scale| Numbers::of_scale(recipe, sources, scale));
        let biases = recipe.bias.map(|grid| of_grid(grid, Role::Bias));
        let fold = |dtype| (0..recipe.cols).map(|k| float(dtype, sources.fold, k)).collect();
        let steps = [
            zero_points.map(|numbers| Step::Numbers(Operation::Subtract, numbers)),
            scales.map(|numbers| Step::Numbers(Operation::Multiply, numbers)),
            recipe.factor.map(Step::Factor),
            biases.map(|numbers| Step::Numbers(Operation::Add, numbers)),
            recipe.fold.map(|dtype| Step::Fold(fold(dtype))),
        ];
        let group_index = recipe.group_index.map(|count| {
            let words = &sources.group_index.as_chunks::<4>().0[..recipe.cols as usize];
            words.iter().map(|word| u32::from_le_bytes(*word).min(count - 1)).collect()
        });
        let (rows, cols) = recipe.codes_size();
        let packed = Packed {
            codes: recipe.codes,
            rows: rows as usize,
            cols: cols as usize,
            first_row: recipe.first_row as usize,
            first_col: recipe.first_col as usize,
            bytes: sources.payload,
        };
        Job {
            packed,
            rows: recipe.rows as usize,
            cols: recipe.cols as usize,
            batch: recipe.batch as usize,
            is_column_lines: has_column_lines(recipe.codes),
            // A single row is the same in both, and only rows are cut.
            layout: if recipe.rows == 1 { Layout::Rows } else { layout },
            widen: Widen::new(recipe, sources),
            steps: steps.into_iter().flatten().collect(),
            group_count: recipe.group_index.unwrap_or(0) as usize,
            group_index,
        }
    }

    fn run<const B: usize>(
        &self,
        target: &mut [u8],
        thread_count: usize,
        round: impl Fn(f32) -> [u8; B] + Copy + Sync,
    ) {
        let elements = target.as_chunks_mut::<B>().0;
        let thread_count = thread_count.min(elements.len().div_ceil(THREAD_LEN_MIN)).max(1);
        let units = Mutex::new(self.units(elements));
        let work = || {
            let mut worker = Worker::new(self, round);
            loop {
                let next = units.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(unit) = next else { break };
                worker.unit(unit);
            }
        };
        thread::scope(|scope| {
            for _ in 1..thread_count {
                // Where the system gives no more threads, those there are do all of it.
                let _ = thread::Builder::new().name("dequantize".to_owned()).spawn_scoped(scope, work);
            }
            work();
        });
    }

    /// Cuts the target. A unit is some whole lines of it, or a part of one where they are very long.
    fn units<'t, const B: usize>(
        &self,
        target: &'t mut [[u8; B]],
    ) -> impl Iterator<Item = Unit<'t, B>> + Send {
        let (rows, cols, layout) = (self.rows, self.cols, self.layout);
        let (lines, width) = if layout == Layout::Rows { (rows, cols) } else { (cols, rows) };
        let is_rows_to_rows = !self.is_across() && !self.is_column_lines;
        let unit_lines = if is_rows_to_rows { (UNIT_LEN / width).max(1) } else { SIDE };
        let part_len = if unit_lines == 1 { UNIT_LEN } else { unit_lines * width };
        target.chunks_mut(lines * width).enumerate().flat_map(move |(e, matrix)| {
            matrix.chunks_mut(unit_lines * width).enumerate().flat_map(move |(i, target)| {
                target.chunks_mut(part_len).enumerate().map(move |(j, target)| {
                    let line_count = target.len().div_ceil(width);
                    let lines = i * unit_lines..i * unit_lines + line_count;
                    let within =
                        if line_count == 1 { j * part_len..j * part_len + target.len() } else { 0..width };
                    let (rows, cols) = if layout == Layout::Rows { (lines, within) } else { (within, lines) };
                    Unit { e, rows, cols, target }
                })
            })
        })
    }

    /// Whether the target's lines are not the payload's.
    fn is_across(&self) -> bool {
        self.is_column_lines == (self.layout == Layout::Rows)
    }

    /// The groups that columns fall into.
    fn groups(&self, numbers: &Numbers<'_>, cols: &Range<usize>) -> Range<usize> {
        match self.group_index {
            Some(_) => 0..self.group_count,
            None => numbers.group(cols.start)..numbers.group(cols.end - 1) + 1,
        }
    }

    fn group(&self, numbers: &Numbers<'_>, k: usize) -> usize {
        match &self.group_index {
            Some(index) => index[k] as usize,
            None => numbers.group(k),
        }
    }
}

/// What a thread needs for itself.
struct Worker<'j, 'a, R> {
    job: &'j Job<'a>,
    round: R,
    codes: Vec<u8>,
    /// The same, turned.
    turned: Vec<u8>,
    /// A line's numbers.
    values: Vec<f32>,
    /// What each step combines them with.
    decoded: Vec<Decoded>,
    /// Codes of zero-points.
    number_codes: Vec<u8>,
}

/// Numbers of neighbouring rows, for each group from the first on.
#[derive(Default)]
struct Decoded {
    first_group: usize,
    /// Distance from a group to the next.
    group_stride: usize,
    /// Distance from a row to the next; 1 where they are combined with columns.
    row_stride: usize,
    numbers: Vec<f32>,
}

impl<'j, 'a, R> Worker<'j, 'a, R> {
    fn new(job: &'j Job<'a>, round: R) -> Self {
        Worker {
            job,
            round,
            codes: vec![0; LINE_LEN.max(SIDE * SIDE)],
            turned: vec![0; SIDE * SIDE],
            values: vec![0.0; LINE_LEN.max(SIDE)],
            decoded: job.steps.iter().map(|_| Decoded::default()).collect(),
            number_codes: Vec::new(),
        }
    }

    fn unit<const B: usize>(&mut self, unit: Unit<'_, B>)
    where
        R: Fn(f32) -> [u8; B] + Copy,
    {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, as it was just asked; nothing else is required of the caller.
            return unsafe { self.unit_with_avx2(unit) };
        }
        self.unit_inlined(unit);
    }

    /// The same code, compiled for vectors of 8 numbers instead of 4: twice as fast for most formats.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn unit_with_avx2<const B: usize>(&mut self, unit: Unit<'_, B>)
    where
        R: Fn(f32) -> [u8; B] + Copy,
    {
        self.unit_inlined(unit);
    }

    // This and all loops below are inlined into both of the above, so as to be compiled for either.
    #[inline(always)]
    fn unit_inlined<const B: usize>(&mut self, unit: Unit<'_, B>)
    where
        R: Fn(f32) -> [u8; B] + Copy,
    {
        let packed = Packed {
            bytes: matrix(self.job.packed.bytes, self.job.batch as u64, unit.e as u64),
            ..self.job.packed
        };
        match (self.job.is_across(), self.job.is_column_lines) {
            (true, _) => self.across(packed, unit),
            (false, false) => self.rows(packed, unit),
            (false, true) => self.columns(packed, unit),
        }
    }

    /// Rows to rows.
    #[inline(always)]
    fn rows<const B: usize>(&mut self, packed: Packed<'_>, unit: Unit<'_, B>)
    where
        R: Fn(f32) -> [u8; B] + Copy,
    {
        let lines = unit.target.chunks_mut(unit.cols.len());
        for (n, line) in unit.rows.zip(lines) {
            self.decode_row(unit.e, n, &unit.cols);
            for (first, target) in unit.cols.clone().step_by(LINE_LEN).zip(line.chunks_mut(LINE_LEN)) {
                let cols = first..first + target.len();
                packed.line(n, first, &mut self.codes[..cols.len()]);
                widen(&self.job.widen, &self.codes[..cols.len()], &mut self.values);
                self.combine_row(0, &cols);
                round_all(&self.values, target, self.round);
            }
        }
    }

    /// Columns to columns: strips of rows, whose numbers are decoded once.
    #[inline(always)]
    fn columns<const B: usize>(&mut self, packed: Packed<'_>, unit: Unit<'_, B>)
    where
        R: Fn(f32) -> [u8; B] + Copy,
    {
        let pitch = unit.rows.len();
        for first in unit.rows.clone().step_by(STRIP_WIDTH) {
            let rows = first..(first + STRIP_WIDTH).min(unit.rows.end);
            let offset = rows.start - unit.rows.start;
            self.decode_strip(unit.e, &rows, &unit.cols);
            for (k, line) in unit.cols.clone().zip(unit.target.chunks_mut(pitch)) {
                packed.line(k, rows.start, &mut self.codes[..rows.len()]);
                widen(&self.job.widen, &self.codes[..rows.len()], &mut self.values);
                self.combine_column(rows.len(), k);
                round_all(&self.values, &mut line[offset..offset + rows.len()], self.round);
            }
        }
    }

    /// Rows to columns or columns to rows: squares, turned.
    #[inline(always)]
    fn across<const B: usize>(&mut self, packed: Packed<'_>, unit: Unit<'_, B>)
    where
        R: Fn(f32) -> [u8; B] + Copy,
    {
        let is_to_rows = self.job.is_column_lines;
        let pitch = if is_to_rows { unit.cols.len() } else { unit.rows.len() };
        for first in unit.rows.clone().step_by(SIDE) {
            let rows = first..(first + SIDE).min(unit.rows.end);
            self.decode_strip(unit.e, &rows, &unit.cols);
            for first in unit.cols.clone().step_by(SIDE) {
                let cols = first..(first + SIDE).min(unit.cols.end);
                let (row_offset, col_offset) = (rows.start - unit.rows.start, cols.start - unit.cols.start);
                let (lines, width) = if is_to_rows { (&cols, &rows) } else { (&rows, &cols) };
                for (line, codes) in lines.clone().zip(self.codes.chunks_mut(width.len())) {
                    packed.line(line, width.start, codes);
                }
                turn(&self.codes, lines.len(), width.len(), &mut self.turned);
                for i in 0..width.len() {
                    let codes = &self.turned[i * lines.len()..][..lines.len()];
                    widen(&self.job.widen, codes, &mut self.values);
                    let place = if is_to_rows {
                        self.combine_row(i, &cols);
                        (row_offset + i) * pitch + col_offset
                    } else {
                        self.combine_column(rows.len(), cols.start + i);
                        (col_offset + i) * pitch + row_offset
                    };
                    round_all(&self.values, &mut unit.target[place..place + lines.len()], self.round);
                }
            }
        }
    }

    /// Decodes each step's numbers of a row, for all groups that some columns fall into.
    #[inline(always)]
    fn decode_row(&mut self, e: usize, n: usize, cols: &Range<usize>) {
        for (step, decoded) in self.job.steps.iter().zip(&mut self.decoded) {
            let Step::Numbers(_, numbers) = step else { continue };
            let groups = self.job.groups(numbers, cols);
            (decoded.first_group, decoded.group_stride) = (groups.start, 1);
            decoded.numbers.resize(groups.len(), 0.0);
            let line = Line::Row { n, first: groups.start };
            numbers.line(e, line, &mut decoded.numbers, &mut self.number_codes);
        }
    }

    /// Decodes each step's numbers of neighbouring rows, for all groups that some columns fall into.
    #[inline(always)]
    fn decode_strip(&mut self, e: usize, rows: &Range<usize>, cols: &Range<usize>) {
        for (step, decoded) in self.job.steps.iter().zip(&mut self.decoded) {
            let Step::Numbers(_, numbers) = step else { continue };
            let groups = self.job.groups(numbers, cols);
            let group_count = groups.len();
            (decoded.first_group, decoded.group_stride, decoded.row_stride) = (groups.start, rows.len(), 1);
            decoded.numbers.resize(group_count * rows.len(), 0.0);
            for (g, line) in groups.zip(decoded.numbers.chunks_mut(rows.len())) {
                numbers.line(e, Line::Group { g, first: rows.start }, line, &mut self.number_codes);
            }
            if self.job.group_index.is_some() && self.job.layout == Layout::Rows {
                // Each column picks its own: better from a few cache lines of its row.
                let of_row = |row: usize| decoded.numbers[row..].iter().step_by(rows.len());
                decoded.numbers = (0..rows.len()).flat_map(of_row).copied().collect();
                (decoded.group_stride, decoded.row_stride) = (1, group_count);
            }
        }
    }

    /// Does every step to columns of a row, the `i`th that numbers were decoded for.
    #[inline(always)]
    fn combine_row(&mut self, i: usize, cols: &Range<usize>) {
        let values = &mut self.values[..cols.len()];
        for (step, decoded) in self.job.steps.iter().zip(&self.decoded) {
            match step {
                Step::Factor(factor) => combine_one(Operation::Multiply, values, *factor),
                Step::Fold(fold) => {
                    combine_each(Operation::Multiply, values, fold[cols.clone()].iter().copied())
                }
                Step::Numbers(operation, numbers) => {
                    let of_row = &decoded.numbers[i * decoded.row_stride..];
                    if let Some(index) = &self.job.group_index {
                        let of_cols = index[cols.clone()].iter();
                        let of_cols = of_cols.map(|g| of_row[*g as usize * decoded.group_stride]);
                        combine_each(*operation, values, of_cols);
                        continue;
                    }
                    let g = numbers.group(cols.start);
                    let of_groups = of_row[(g - decoded.first_group) * decoded.group_stride..].iter();
                    let of_groups = of_groups.step_by(decoded.group_stride).copied();
                    let to_end = numbers.group_end(g) - cols.start;
                    combine_runs(*operation, values, of_groups, to_end, numbers.cols_per_group());
                }
            }
        }
    }

    /// Does every step to a column of the rows that numbers were decoded for.
    #[inline(always)]
    fn combine_column(&mut self, row_count: usize, k: usize) {
        let values = &mut self.values[..row_count];
        for (step, decoded) in self.job.steps.iter().zip(&self.decoded) {
            match step {
                Step::Factor(factor) => combine_one(Operation::Multiply, values, *factor),
                Step::Fold(fold) => combine_one(Operation::Multiply, values, fold[k]),
                Step::Numbers(operation, numbers) => {
                    let line = self.job.group(numbers, k) - decoded.first_group;
                    let of_rows = &decoded.numbers[line * row_count..][..row_count];
                    combine_each(*operation, values, of_rows.iter().copied());
                }
            }
        }
    }
}

impl Widen {
    fn new(recipe: &Recipe, sources: &Sources<'_>) -> Widen {
        let bits = recipe.codes.bits();
        let zero_point = if let ZeroPoint::Constant(zero_point) = recipe.zero_point { zero_point } else { 0 };
        let of_code = |code: usize| match recipe.element {
            Element::Signed => (sign_extended(code as u8, bits) - zero_point) as f32,
            // Wider codes than the element has do not occur.
            _ if code >> bits != 0 => 0.0,
            kind => element(kind, bits, code as u8, sources.table),
        };
        match recipe.element {
            Element::Unsigned => Widen::Unsigned(zero_point),
            _ => Widen::Table(Box::new(std::array::from_fn(of_code))),
        }
    }
}

#[inline(always)]
fn widen(widen: &Widen, codes: &[u8], values: &mut [f32]) {
    let pairs = values.iter_mut().zip(codes);
    match widen {
        Widen::Unsigned(zero_point) => {
            pairs.for_each(|(v, code)| *v = (i32::from(*code) - zero_point) as f32)
        }
        Widen::Table(table) => pairs.for_each(|(v, code)| *v = table[usize::from(*code)]),
    }
}

#[inline(always)]
fn round_all<const B: usize>(values: &[f32], target: &mut [[u8; B]], round: impl Fn(f32) -> [u8; B]) {
    target.iter_mut().zip(values).for_each(|(element, v)| *element = round(*v));
}

/// Elements of a row that are done at a time: 16 KiB of F32, which stay in the first-level cache.
const LINE_LEN: usize = 4096;
/// Rows that are done at a time, down all columns of a unit.
const STRIP_WIDTH: usize = 256;
/// Rows and columns of a square that is turned: 16 KiB of codes.
const SIDE: usize = 128;
/// Elements that a thread takes at a time.
const UNIT_LEN: usize = 1 << 16;
/// Elements for which another thread is worth its start, some 50 us of work.
const THREAD_LEN_MIN: usize = 1 << 16;
