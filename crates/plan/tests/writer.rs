//! Encoded headers read back as they were meant, here and with the `safetensors` crate.

// A failed expectation is the test's own report, in helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use safetensors::SafeTensors;
use tensorhaul_plan::dtype::{Dtype, numel};
use tensorhaul_plan::header::{HEADER_LEN_BYTES_MAX, Header, HeaderError, NewTensor, encode};

#[test]
fn data_starts_at_the_alignment_asked_for() {
    let tensors = [NewTensor { name: "w", dtype: Dtype::F32, shape: &[2, 2] }];
    for data_align_bytes in [0, 1, 3, 8, 512, 4096, 1 << 20] {
        let bytes = encode(&tensors, &BTreeMap::new(), data_align_bytes).unwrap();
        assert_eq!(bytes.len() as u64 % data_align_bytes.max(1), 0);
        let header = Header::parse(&bytes[8..], bytes.len() as u64 + 16).unwrap();
        assert_eq!(header.data_start_bytes(), bytes.len() as u64);
        assert_eq!(bytes[..8], (bytes.len() as u64 - 8).to_le_bytes());
    }
}

#[test]
fn the_json_is_that_of_the_reference() {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let tensors = [
        NewTensor { name: "a", dtype: Dtype::F8E4m3, shape: &[4] },
        NewTensor { name: "\"\u{1}", dtype: Dtype::Bf16, shape: &[] },
    ];
    let json = |tensors: &[_], metadata: &_| {
        String::from_utf8(encode(tensors, metadata, 1).unwrap().split_off(8)).unwrap()
    };
    assert_eq!(
        json(&tensors, &metadata),
        concat!(
            r#"{"__metadata__":{"format":"pt"},"#,
            r#""a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},"#,
            r#""\"\u0001":{"dtype":"BF16","shape":[],"data_offsets":[4,6]}}"#,
        )
    );
    assert_eq!(json(&[], &metadata), r#"{"__metadata__":{"format":"pt"}}"#);
    assert_eq!(json(&[], &BTreeMap::new()), "{}");
}

#[test]
fn tensors_that_no_reader_would_accept_are_refused_by_name() {
    let text = |tensors: &[NewTensor<'_>]| encode(tensors, &BTreeMap::new(), 4096).unwrap_err().to_string();
    let tensor = |name, dtype, shape| NewTensor { name, dtype, shape };
    let a = tensor("a", Dtype::F32, &[2]);
    assert_eq!(text(&[a, a]), "tensor \"a\": listed twice, with data_offsets [0, 8] and [8, 16]");
    assert_eq!(
        text(&[a, tensor("__metadata__", Dtype::F32, &[2])]),
        "tensor \"__metadata__\": this name is reserved by the format; choose another"
    );
    assert_eq!(
        text(&[tensor("b", Dtype::F4, &[3])]),
        "tensor \"b\": F4 [3] needs 12 bits, which are no whole bytes"
    );
    assert_eq!(
        text(&[tensor("c", Dtype::U8, &[1 << 32, 1 << 32])]),
        "tensor \"c\": U8 [4294967296, 4294967296] needs more bits than a 64-bit number counts"
    );
    let names = ["0", "1", "2", "3", "4", "5", "6", "7", "8"];
    let most = names.map(|name| tensor(name, Dtype::U8, &[(1 << 61) - 1]));
    assert_eq!(text(&most), "tensor \"8\": the data ends beyond what a 64-bit number counts");
}

#[test]
fn a_header_beyond_the_maximum_is_refused() {
    let metadata = |len: u64| BTreeMap::from([("a".to_owned(), "x".repeat(len as usize))]);
    let around_len = encode(&[], &metadata(0), 1).unwrap().len() as u64 - 8;
    let longest = encode(&[], &metadata(HEADER_LEN_BYTES_MAX - around_len), 1).unwrap();
    assert!(Header::parse(&longest[8..], longest.len() as u64).is_ok());
    let header_len_bytes = HEADER_LEN_BYTES_MAX + 1;
    assert_eq!(
        encode(&[], &metadata(header_len_bytes - around_len), 1),
        Err(HeaderError::TooLong { header_len_bytes })
    );
    // Padding counts: readers see the padded length.
    assert!(matches!(encode(&[], &metadata(0), u64::MAX), Err(HeaderError::TooLong { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_encoded_header_reads_back(
        tensors in btree_map(any::<String>(), (select(&Dtype::ALL[..]), vec(0..4u64, 0..4)), 0..8),
        metadata in btree_map(any::<String>(), any::<String>(), 0..3),
        align_bits in 0..13u32,
    ) {
        let whole_bytes = |(dtype, shape): &(Dtype, Vec<u64>)| dtype.len_bytes(numel(shape).unwrap()).is_some();
        let tensors: Vec<_> =
            tensors.iter().filter(|(name, tensor)| *name != "__metadata__" && whole_bytes(tensor)).collect();
        let new: Vec<NewTensor<'_>> = tensors
            .iter()
            .map(|(name, (dtype, shape))| NewTensor { name, dtype: *dtype, shape })
            .collect();
        let mut file = encode(&new, &metadata, 1 << align_bits).unwrap();
        let data_start = file.len();
        let len_bytes = |(dtype, shape): &(Dtype, Vec<u64>)| dtype.len_bytes(numel(shape).unwrap()).unwrap();
        let data_len: u64 = tensors.iter().map(|(_, tensor)| len_bytes(tensor)).sum();
        file.resize(data_start + data_len as usize, 0);

        let header = Header::parse(&file[8..data_start], file.len() as u64).unwrap();
        prop_assert_eq!(header.metadata(), &metadata);
        prop_assert_eq!(header.len(), new.len());
        for (read, new) in header.tensors().zip(&new) {
            // Empty tensors at one offset keep their order, so all come back as they were written.
            prop_assert_eq!((read.name, read.dtype, read.shape), (new.name, new.dtype, new.shape));
        }
        let (header_len, theirs) = SafeTensors::read_metadata(&file).unwrap();
        prop_assert_eq!(header_len + 8, data_start);
        prop_assert_eq!(theirs.tensors().len(), new.len());
    }
}
