//! A slice is the part a naive walk keeps, whatever its type, dimension and way in, and only its bytes are read.

use std::ops::Range;

use tensorhaul::{
    Dtype, EngineChoice, ErrorKind, Handover, LoadOptions, Model, Preference, Request, Select, Slice, Tensor,
};

use crate::common::{Dice, Folder, Stored, assert_consistent, encode, evict, stored};

#[test]
fn slices_of_every_type_in_every_dimension_are_what_a_naive_walk_keeps() {
    let folder = Folder::on_disk();
    let shape = [6, 10, 16];
    let tensors: Vec<Stored> = Dtype::ALL.iter().map(|dtype| stored(dtype.name(), *dtype, &shape)).collect();
    for data_phase in [0, 1] {
        let model = Model::open(folder.write("all.safetensors", &encode(&tensors, data_phase))).unwrap();
        for tensor in &tensors {
            for ranges in [
                vec![2..5],
                vec![0..6, 3..7],
                vec![0..6, 0..10, 8..16],
                vec![1..2, 2..3, 0..8],
                vec![1..6, 0..10, 4..12],
                vec![0..6, 9..10, 0..16],
                vec![],
            ] {
                let naive = naive(tensor, &ranges);
                let part = model.slice(&tensor.name, &Slice::new(ranges.clone())).unwrap();
                assert_is(&part, tensor, &ranges, &naive);
            }
        }
    }
}

#[test]
fn random_slices_load_the_same_through_every_engine_hot_and_cold() {
    let mut dice = Dice::printed();
    for round in 0..60 {
        let folder = Folder::on_disk();
        let tensors: Vec<Stored> =
            (0..1 + dice.below(5)).map(|number| random_tensor(&mut dice, number)).collect();
        let path = folder.write("random.safetensors", &encode(&tensors, dice.below(4096)));
        let mut request = Request::of(Select::All);
        let mut expected = Vec::new();
        for tensor in &tensors {
            let ranges: Vec<Range<u64>> =
                tensor.shape.iter().map(|len| random_range(&mut dice, *len)).collect();
            expected.push((ranges.clone(), naive(tensor, &ranges)));
            request.slices.push((tensor.name.clone(), Slice::new(ranges)));
        }
        for engine in [EngineChoice::Auto, EngineChoice::Mmap, EngineChoice::Pread, EngineChoice::IoUring] {
            let model = Model::open(&path).unwrap();
            if dice.below(2) == 0 {
                evict(&path);
            }
            let options = LoadOptions::default()
                .request(request.clone())
                .engine(engine)
                .in_place(dice.pick(&[Preference::Preferred, Preference::Off]))
                .staging_bytes(dice.pick(&[4096, 64 << 10, 1 << 20]));
            let context = format!("round {round}: {options:?}");
            let loaded = model.load(&options).unwrap_or_else(|error| panic!("{context}: {error:?}"));
            assert_consistent(&loaded.report, 1 << 20, &context);
            for (tensor, (ranges, naive)) in tensors.iter().zip(&expected) {
                assert_is(loaded.tensors.get(&tensor.name).unwrap(), tensor, ranges, naive);
                assert_is(
                    &model.slice(&tensor.name, &Slice::new(ranges.clone())).unwrap(),
                    tensor,
                    ranges,
                    naive,
                );
            }
        }
    }
}

#[test]
fn slices_that_do_not_exist_are_errors_naming_the_tensor_and_the_dimension() {
    let folder = Folder::on_disk();
    let tensors = [
        stored("w", Dtype::F32, &[4, 6]),
        stored("scalar", Dtype::F32, &[]),
        stored("codes", Dtype::F4, &[2, 8]),
    ];
    let model = Model::open(folder.write("w.safetensors", &encode(&tensors, 0))).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "the error is about one")]
    let cases: [(&str, Vec<Range<u64>>, &str); 7] = [
        ("w", vec![5..3], "5..3 of dimension 0 is backwards (it has 4 elements)"),
        ("w", vec![3..1], "3..1 of dimension 0 is backwards (it has 4 elements)"),
        ("w", vec![0..5], "0..5 leaves dimension 0, which has 4 elements"),
        ("w", vec![0..4, 6..7], "6..7 leaves dimension 1, which has 6 elements"),
        ("w", vec![0..1, 0..1, 0..1], "the slice has 3 dimensions, the tensor 2"),
        ("scalar", vec![0..1], "the slice has 1 dimensions, the tensor 0"),
        (
            "codes",
            vec![0..2, 1..5],
            "the slice cuts packed F4 elements inside a byte; cut at a multiple of 2",
        ),
    ];
    for (name, ranges, text) in cases {
        let slice = Slice::new(ranges);
        let mut request = Request::of(Select::Names(vec![name.to_owned()]));
        request.slices = vec![(name.to_owned(), slice.clone())];
        let loaded = model.load(&LoadOptions::default().request(request)).map(drop).unwrap_err();
        for error in [model.slice(name, &slice).map(drop).unwrap_err(), loaded] {
            assert_eq!((error.kind(), error.tensor()), (ErrorKind::BadRequest, Some(name)), "{error:?}");
            assert!(error.one_line().contains(text) && error.one_line().contains(name), "{text}: {error:?}");
        }
    }
}

#[test]
fn a_slice_of_a_tensor_that_is_not_asked_for_is_refused() {
    let folder = Folder::on_disk();
    let tensors = [stored("a", Dtype::F32, &[4]), stored("b", Dtype::F32, &[4])];
    let model = Model::open(folder.write("w.safetensors", &encode(&tensors, 0))).unwrap();
    for name in ["b", "c"] {
        let mut request = Request::of(Select::Names(vec!["a".to_owned()]));
        request.slices = vec![(name.to_owned(), Slice::new([0..1]))];
        let error = model.load(&LoadOptions::default().request(request)).map(drop).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (ErrorKind::BadRequest, Some(name)), "{error:?}");
    }
}

#[test]
fn empty_slices_are_empty_tensors_of_their_shape() {
    let folder = Folder::on_disk();
    let tensors = [stored("w", Dtype::F32, &[4, 6]), stored("none", Dtype::F32, &[4, 0])];
    let model = Model::open(folder.write("w.safetensors", &encode(&tensors, 3))).unwrap();
    for (name, ranges, shape) in [
        ("w", vec![2..2], [0, 6]),
        ("w", vec![0..4, 6..6], [4, 0]),
        ("w", vec![4..4, 1..3], [0, 2]),
        ("none", vec![1..3, 0..0], [2, 0]),
    ] {
        let part = model.slice(name, &Slice::new(ranges.clone())).unwrap();
        assert_eq!((part.shape(), part.len_bytes()), (&shape[..], 0), "{name} {ranges:?}");
        assert!(part.bytes().unwrap().is_empty() && part.as_slice::<f32>().unwrap().is_empty());
        let mut request = Request::of(Select::Names(vec![name.to_owned()]));
        request.slices = vec![(name.to_owned(), Slice::new(ranges))];
        let loaded = model.load(&LoadOptions::default().request(request)).unwrap();
        assert_eq!(loaded.tensors.get(name).unwrap().shape(), shape);
        assert_eq!((loaded.report.bytes, loaded.report.reads), (0, 0));
    }
}

#[test]
fn leading_rows_are_mapped_and_inner_columns_read_for_themselves() {
    let folder = Folder::on_disk();
    let model = Model::open(folder.write("w.safetensors", &encode(&[stored("w", Dtype::F32, &[64, 64])], 0)))
        .unwrap();
    assert!(model.slice("w", &Slice::new([3..9])).unwrap().is_mapped());
    assert!(!model.slice("w", &Slice::new([3..9, 2..4])).unwrap().is_mapped());
    let handover = LoadOptions::default().handover(Handover::Auto);
    assert!(model.load(&handover).unwrap().tensors.get("w").unwrap().is_mapped());
}

/// Keeps the elements that lie inside every range, one by one, bit by bit.
fn naive(tensor: &Stored, ranges: &[Range<u64>]) -> Vec<u8> {
    let bits = tensor.dtype.bits();
    let numel: u64 = tensor.shape.iter().product();
    let keeps = |flat: &u64| {
        let mut rest = *flat;
        tensor.shape.iter().enumerate().rev().all(|(dim, len)| {
            let index = rest % len;
            rest /= len;
            ranges.get(dim).is_none_or(|range| range.contains(&index))
        })
    };
    let mut kept = Vec::new();
    let mut filled = 0;
    for element in (0..numel).filter(keeps) {
        for bit in element * bits..(element + 1) * bits {
            let value = tensor.bytes[(bit / 8) as usize] >> (bit % 8) & 1;
            if filled % 8 == 0 {
                kept.push(0);
            }
            *kept.last_mut().unwrap() |= value << (filled % 8);
            filled += 1;
        }
    }
    kept
}

fn assert_is(part: &Tensor, tensor: &Stored, ranges: &[Range<u64>], naive: &[u8]) {
    let context = format!("{} {:?} {ranges:?}", tensor.name, tensor.shape);
    let len = |(dim, len): (usize, &u64)| ranges.get(dim).map_or(*len, |range| range.end - range.start);
    let shape: Vec<u64> = tensor.shape.iter().enumerate().map(len).collect();
    assert_eq!((part.shape(), part.dtype()), (&*shape, tensor.dtype), "{context}");
    assert!(part.bytes().unwrap() == naive, "{context}: the bytes differ");
}

fn random_tensor(dice: &mut Dice, number: u64) -> Stored {
    let dtype = dice.pick(&[Dtype::U8, Dtype::Bf16, Dtype::F32, Dtype::F64, Dtype::F8E4m3]);
    let dims = [1, 2, 3, 5, 8, 17, 64, 130];
    let shape: Vec<u64> = (0..dice.below(4)).map(|_| dice.pick(&dims)).collect();
    stored(&format!("layers.{number}.w"), dtype, &shape)
}

fn random_range(dice: &mut Dice, len: u64) -> Range<u64> {
    let (a, b) = (dice.below(len + 1), dice.below(len + 1));
    if dice.below(3) == 0 { 0..len } else { a.min(b)..a.max(b) }
}
