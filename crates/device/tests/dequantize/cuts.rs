//! A part of a quantized tensor, made of parts of its stored tensors, is that part of the whole.

use std::ops::Range;

use tensorhaul_device::dequantize::{Layout, Output, Sources, dequantize, reference};
use tensorhaul_plan::quant::{CutError, Group, Recipe, Role, Window, ZeroPoint};
use tensorhaul_plan::{Dtype, Slice};

use crate::models::{Found, checkpoints};

/// Every family, cut for ranks and at random.
#[test]
fn parts_of_every_family_are_parts_of_the_whole() {
    for found in checkpoints() {
        for_each_window(&found, |group, whole, window| {
            let cut =
                group.cut(&found.checkpoint, window).unwrap_or_else(|error| panic!("{window:?}: {error}"));
            let members: Vec<(Role, Vec<u8>)> = cut
                .members
                .iter()
                .map(|member| {
                    let bytes = sliced(found.bytes(member.tensor), 8, &member.shape, &member.slice);
                    assert_eq!(bytes.len() as u64, member.len_bytes());
                    assert_eq!(bytes.len() as u64, member.pieces().unwrap().len_bytes());
                    (member.role, bytes)
                })
                .collect();
            let expected = part(whole, &group.recipe, window);
            for (how, found) in
                [("reference", run(&cut.recipe, &members, 0)), ("fast", run(&cut.recipe, &members, 2))]
            {
                assert_eq!(found.len(), expected.len(), "{how}");
                let different =
                    found.iter().zip(&expected).position(|(found, expected)| !is_same(*found, *expected));
                assert_eq!(different, None, "{how}: first different number: {:?}", cut.recipe);
            }
            columns_are_rows(&cut.recipe, &members, &expected);
        });
    }
}

/// What is handed over as stored is what the exact cut reads, and nothing that it covers.
#[test]
fn stored_slices_are_exact_or_refused() {
    let mut counts = [0, 0];
    for found in checkpoints() {
        for_each_window(&found, |group, _, window| match group.stored_slices(&found.checkpoint, window) {
            Ok(slices) => {
                counts[0] += 1;
                assert_eq!(slices.len(), group.members.len());
                let cut = group.cut(&found.checkpoint, window).unwrap();
                assert!(is_exact(&cut.recipe), "{:?}", cut.recipe);
                let has_numbers = !window.shape().contains(&0);
                for member in cut.members.iter().filter(|_| has_numbers) {
                    let info = found.checkpoint.tensor(member.tensor).info;
                    let (_, slice) = slices.iter().find(|(id, _)| *id == member.tensor).unwrap();
                    let stored = sliced(found.bytes(member.tensor), info.dtype.bits(), info.shape, slice);
                    let read = sliced(found.bytes(member.tensor), 8, &member.shape, &member.slice);
                    assert!(stored == read, "{}: {slice:?} of {:?}", info.name, info.shape);
                }
            }
            Err(CutError::InsideUnit { dim, at, unit, nearest, .. }) => {
                counts[1] += 1;
                let (range, len) = match dim {
                    "row" => (&window.rows, group.recipe.rows),
                    _ => (&window.cols, group.recipe.cols),
                };
                assert!(!at.is_multiple_of(unit) && at < len);
                assert!(range.start == at || range.end == at, "{dim} {at} of {window:?}");
                assert!(nearest[0] < at && at < nearest[1] && nearest[1] <= len);
                // What the error says would work does, along this index.
                for range in [0..nearest[1], 0..nearest[0], nearest[0]..nearest[1]] {
                    let window = match dim {
                        "row" => Window { rows: range, ..Window::all(group) },
                        _ => Window { cols: range, ..Window::all(group) },
                    };
                    let slices = group.stored_slices(&found.checkpoint, &window);
                    assert!(!matches!(slices, Err(CutError::InsideUnit { .. })), "{slices:?}");
                }
            }
            Err(CutError::NotASlice { .. }) => counts[1] += 1,
            Err(error) => panic!("{error}"),
        });
    }
    assert!(counts[0] > 500 && counts[1] > 500, "{counts:?}");
}

/// A slice of the result's shape is found as a window, or is none of whole packed rows.
#[test]
fn slices_of_results_are_windows_of_the_same_numbers() {
    for found in checkpoints() {
        for group in found.quantization.groups() {
            let whole = whole(&found, group);
            let shape = &group.shape;
            let mut slices: Vec<Vec<Range<u64>>> = vec![vec![]];
            for tp_size in [1, 2, 3, 4, 8] {
                for dim in 0..shape.len() {
                    for range in ranks(shape[dim], tp_size) {
                        let of = |at: usize| if at == dim { range.clone() } else { 0..shape[at] };
                        slices.push((0..=dim).map(of).collect());
                    }
                }
            }
            for ranges in slices {
                let window = match group.window(&ranges) {
                    Ok(window) => window,
                    Err(CutError::NotARectangle { multiple, .. }) => {
                        let is_rows = ranges.len() == 1
                            || ranges.iter().skip(1).zip(&shape[1..]).all(|(range, len)| *range == (0..*len));
                        let is_multiple =
                            [ranges[0].start, ranges[0].end].iter().all(|at| at.is_multiple_of(multiple));
                        assert!(!(is_rows && is_multiple), "{}: {ranges:?} of {shape:?}", found.title);
                        continue;
                    }
                    Err(error) => panic!("{}: {error}", found.title),
                };
                let bytes: Vec<u8> = whole.iter().flat_map(|v| v.to_le_bytes()).collect();
                let expected = sliced(&bytes, 32, shape, &Slice::new(ranges.clone()));
                let numbers = part(&whole, &group.recipe, &window);
                let numbers: Vec<u8> = numbers.iter().flat_map(|v| v.to_le_bytes()).collect();
                assert!(numbers == expected, "{}: {ranges:?} of {shape:?} is not {window:?}", found.title);
            }
        }
    }
}

/// Calls for each group with windows of every kind: all, none, ranks' parts along each index and both, single matrices, any.
fn for_each_window(found: &Found, mut check: impl FnMut(&Group, &[f32], &Window)) {
    let mut random = Random(7);
    for group in found.quantization.groups() {
        let whole = whole(found, group);
        let recipe = &group.recipe;
        let all = Window::all(group);
        let mut windows = vec![all.clone()];
        for tp_size in [2, 3, 4, 8] {
            let (rows, cols) = (ranks(recipe.rows, tp_size), ranks(recipe.cols, tp_size));
            windows.extend(rows.iter().map(|rows| Window { rows: rows.clone(), ..all.clone() }));
            windows.extend(cols.iter().map(|cols| Window { cols: cols.clone(), ..all.clone() }));
            windows.extend(rows.iter().zip(&cols).map(|(rows, cols)| Window {
                rows: rows.clone(),
                cols: cols.clone(),
                ..all.clone()
            }));
        }
        windows.extend((0..recipe.batch).map(|e| Window { batch: e..e + 1, ..all.clone() }));
        for _ in 0..60 {
            let [batch, rows, cols] = [recipe.batch, recipe.rows, recipe.cols].map(|len| random.range(len));
            windows.push(Window { batch, rows, cols });
        }
        for window in windows {
            let _context = Context(&found.title, &group.recipe, &window);
            check(group, &whole, &window);
        }
    }
}

/// Says which window it was when a check panics.
struct Context<'c>(&'c str, &'c Recipe, &'c Window);

impl Drop for Context<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {:?} of {:?}", self.0, self.2, self.1);
        }
    }
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn range(&mut self, len: u64) -> Range<u64> {
        let mut below = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % (len + 1)
        };
        let (a, b) = (below(), below());
        a.min(b)..a.max(b)
    }
}

/// The parts of ranks: multiples of what divides evenly, then the rest.
fn ranks(len: u64, tp_size: u64) -> Vec<Range<u64>> {
    (0..tp_size).map(|rank| len * rank / tp_size..len * (rank + 1) / tp_size).collect()
}

fn whole(found: &Found, group: &Group) -> Vec<f32> {
    let members: Vec<(Role, Vec<u8>)> =
        group.members.iter().map(|(role, id)| (*role, found.bytes(*id).to_vec())).collect();
    run(&group.recipe, &members, 0)
}

/// The numbers of a recipe: by the reference where no threads are named.
fn run(recipe: &Recipe, members: &[(Role, Vec<u8>)], thread_count: usize) -> Vec<f32> {
    let output = Output { dtype: Dtype::F32, layout: Layout::Rows };
    numbers(recipe, members, output, thread_count)
}

fn numbers(recipe: &Recipe, members: &[(Role, Vec<u8>)], output: Output, thread_count: usize) -> Vec<f32> {
    let sources: Sources<'_> = members.iter().map(|(role, bytes)| (*role, &bytes[..])).collect();
    let mut target = vec![0xaa; recipe.target_len_bytes(output.dtype).expect("small") as usize];
    match thread_count {
        0 => reference::dequantize(recipe, &sources, output, &mut target),
        _ => dequantize(recipe, &sources, output, &mut target, thread_count),
    }
    target.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The other order of the target, by the fast execution.
fn columns_are_rows(recipe: &Recipe, members: &[(Role, Vec<u8>)], expected: &[f32]) {
    let output = Output { dtype: Dtype::F32, layout: Layout::Columns };
    let found = numbers(recipe, members, output, 1);
    let (rows, cols) = (recipe.rows as usize, recipe.cols as usize);
    for (at, number) in expected.iter().enumerate() {
        let (e, n, k) = (at / (rows * cols), at / cols % rows, at % cols);
        assert!(is_same(found[e * rows * cols + k * rows + n], *number), "[{e}, {n}, {k}] in columns");
    }
}

fn is_same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// Whether nothing comes before the first number.
fn is_exact(recipe: &Recipe) -> bool {
    let zero_grid = if let ZeroPoint::Float(grid) = recipe.zero_point { Some(grid) } else { None };
    let grids = recipe.scale.iter().map(|scale| scale.grid).chain(recipe.bias).chain(zero_grid);
    let firsts = grids.map(|grid| (grid.row_first, grid.col_first));
    (recipe.first_row, recipe.first_col) == (0, 0) && firsts.into_iter().all(|first| first == (0, 0))
}

/// The numbers of a window, out of all.
fn part(whole: &[f32], recipe: &Recipe, window: &Window) -> Vec<f32> {
    let mut part = Vec::new();
    for e in window.batch.clone() {
        for n in window.rows.clone() {
            for k in window.cols.clone() {
                part.push(whole[((e * recipe.rows + n) * recipe.cols + k) as usize]);
            }
        }
    }
    part
}

/// The elements of a slice back to back, bit by bit.
fn sliced(bytes: &[u8], bits: u64, shape: &[u64], slice: &Slice) -> Vec<u8> {
    let mut places = vec![0u64];
    for (dim, len) in shape.iter().enumerate() {
        let range = slice.ranges().get(dim).map_or(0..*len, |range| range.start..range.stop);
        places =
            places.iter().flat_map(|place| range.clone().map(move |index| place * len + index)).collect();
    }
    if bits.is_multiple_of(8) {
        let width = bits as usize / 8;
        return places.iter().flat_map(|place| &bytes[*place as usize * width..][..width]).copied().collect();
    }
    let mut result = vec![0u8; (places.len() as u64 * bits).div_ceil(8) as usize];
    let all = places.iter().flat_map(|place| place * bits..(place + 1) * bits);
    for (to, from) in all.enumerate() {
        result[to / 8] |= (bytes[from as usize / 8] >> (from % 8) & 1) << (to % 8);
    }
    result
}
