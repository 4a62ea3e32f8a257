//! Headers by chance: well-formed ones in every spelling, then damaged ones.
//!
//! A failure prints its smallest input and its seed; `PROPTEST_RNG_SEED` takes the seed back.

use std::collections::HashSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use tensorhaul_plan::dtype::{Dtype, numel};

use super::cases::file;
use super::oracle::{Verdict, compare};

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn well_formed_headers_are_read_as_the_reference_reads_them(draft in draft()) {
        let names: HashSet<&str> = draft.tensors.iter().map(|tensor| &*tensor.name).collect();
        let named_once = names.len() == draft.tensors.len();
        match compare(&draft.render()) {
            Verdict::Accepted => prop_assert!(named_once),
            Verdict::Refused(error) | Verdict::Differs(_, error) => prop_assert!(!named_once, "{}", error),
        }
    }

    #[test]
    fn damaged_headers_get_the_verdict_of_the_reference(draft in draft(), damages in vec(damage(), 1..4)) {
        let mut file = draft.render();
        for damage in &damages {
            damage.apply(&mut file);
        }
        compare(&file);
    }

    #[test]
    fn random_tokens_get_the_verdict_of_the_reference(tokens in vec(select(TOKENS), 0..24)) {
        compare(&file(tokens.concat().as_bytes(), 8));
    }
}

/// A file to be spelled out.
#[derive(Debug)]
struct Draft {
    tensors: Vec<DraftTensor>,
    /// The order in which the entries are listed, by sorting on these.
    order: Vec<u16>,
    metadata: Option<&'static str>,
    space: &'static str,
}

#[derive(Debug)]
struct DraftTensor {
    name: String,
    escaped: bool,
    dtype: Dtype,
    shape: Vec<u64>,
    spelling: &'static str,
}

fn draft() -> impl Strategy<Value = Draft> {
    let metadata = select(&["null", "{}", r#"{"format":"pt"}"#, r#"{"a":"1","a":"2","":"\u0000"}"#][..]);
    (
        vec(draft_tensor(), 0..6),
        vec(any::<u16>(), 6),
        proptest::option::of(metadata),
        select(&["", " ", "\r\n\t"][..]),
    )
        .prop_map(|(tensors, order, metadata, space)| Draft { tensors, order, metadata, space })
}

fn draft_tensor() -> impl Strategy<Value = DraftTensor> {
    // Few enough short names that two tensors share one now and then.
    let name = prop_oneof!["[a-d\u{e9}]{1,3}", "[a-z]{1,8}(\\.[0-9]{1,2}){0,2}\\.weight", any::<String>()]
        .prop_filter("is no tensor", |name| name != "__metadata__");
    let shape = vec(prop_oneof![4 => 1..5u64, 1 => Just(0)], 0..4);
    (name, any::<bool>(), select(&Dtype::ALL[..]), shape, select(SPELLINGS)).prop_map(
        |(name, escaped, dtype, mut shape, spelling)| {
            if dtype.bits() < 8 {
                shape.push(4);
            }
            DraftTensor { name, escaped, dtype, shape, spelling }
        },
    )
}

impl Draft {
    fn render(&self) -> Vec<u8> {
        let mut start_bytes = 0;
        let mut entries: Vec<(u16, String)> = Vec::new();
        for (tensor, order) in self.tensors.iter().zip(&self.order) {
            let end_bytes =
                start_bytes + numel(&tensor.shape).and_then(|numel| tensor.dtype.len_bytes(numel)).unwrap();
            let entry = tensor
                .spelling
                .replace("DTYPE", tensor.dtype.name())
                .replace("SHAPE", &format!("{:?}", tensor.shape))
                .replace("DATA_OFFSETS", &format!("[{start_bytes},{end_bytes}]"));
            entries.push((*order, format!("{}:{entry}", tensor.key())));
            start_bytes = end_bytes;
        }
        if let Some(metadata) = self.metadata {
            entries.push((self.order[0], format!("\"__metadata__\":{metadata}")));
        }
        entries.sort();
        let entries: Vec<String> = entries.into_iter().map(|(_, entry)| entry).collect();
        let Draft { space, .. } = self;
        let json = format!("{space}{{{space}{}{space}}}{space}", entries.join(&format!("{space},{space}")));
        file(json.as_bytes(), start_bytes as usize)
    }
}

impl DraftTensor {
    fn key(&self) -> String {
        if self.escaped {
            let units: String = self.name.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
            format!("\"{units}\"")
        } else {
            serde_json::to_string(&self.name).unwrap()
        }
    }
}

/// A change to the bytes of a file. All but `Cut` and `Extend` leave the length prefix true.
#[derive(Debug)]
enum Damage {
    SetByte(Index, u8),
    SetDigit(Index, u8),
    Insert(Index, &'static str),
    Remove(Index, u8),
    Repeat(Index, u8),
    Swap(Index, Index),
    Cut(u8),
    Extend(u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<(Index, u8)>().prop_map(|(at, byte)| Damage::SetByte(at, byte)),
        (any::<Index>(), b'0'..=b'9').prop_map(|(at, digit)| Damage::SetDigit(at, digit)),
        (any::<Index>(), select(TOKENS)).prop_map(|(at, token)| Damage::Insert(at, token)),
        (any::<Index>(), 1..8u8).prop_map(|(at, len)| Damage::Remove(at, len)),
        any::<(Index, u8)>().prop_map(|(at, len)| Damage::Repeat(at, len)),
        any::<(Index, Index)>().prop_map(|(a, b)| Damage::Swap(a, b)),
        (1..9u8).prop_map(Damage::Cut),
        (1..9u8).prop_map(Damage::Extend),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let json_len = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let mut json = bytes[8..][..json_len].to_vec();
        let mut data_len = bytes.len() - 8 - json_len;
        let at = |index: &Index| index.index(json_len.max(1)).min(json_len);
        match self {
            Damage::SetByte(index, byte) => {
                json.splice(at(index)..json_len.min(at(index) + 1), [*byte]).for_each(drop)
            }
            Damage::SetDigit(index, digit) => {
                let digits: Vec<usize> =
                    (0..json_len).filter(|place| json[*place].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    json[digits[index.index(digits.len())]] = *digit;
                }
            }
            Damage::Insert(index, token) => json.splice(at(index)..at(index), token.bytes()).for_each(drop),
            Damage::Remove(index, len) => {
                json.drain(at(index)..json_len.min(at(index) + usize::from(*len)));
            }
            Damage::Repeat(index, len) => {
                let part = json[at(index)..json_len.min(at(index) + usize::from(*len))].to_vec();
                json.splice(at(index)..at(index), part).for_each(drop);
            }
            Damage::Swap(a, b) if json_len > 0 => json.swap(at(a), at(b)),
            Damage::Swap(..) => {}
            Damage::Cut(len) => data_len = data_len.saturating_sub(usize::from(*len)),
            Damage::Extend(len) => data_len += usize::from(*len),
        }
        *bytes = file(&json, data_len);
    }
}

const SPELLINGS: &[&str] = &[
    r#"{"dtype":"DTYPE","shape":SHAPE,"data_offsets":DATA_OFFSETS}"#,
    r#"{ "data_offsets" : DATA_OFFSETS , "shape" : SHAPE , "dtype" : "DTYPE" }"#,
    r#"{"shape":SHAPE,"x":[{"y":-1.5e3}],"dtype":{"DTYPE":null},"data_offsets":DATA_OFFSETS,"x":null}"#,
    r#"{"sh\u0061pe":SHAPE,"\u0064type":"DTYPE","data\u005foffsets":DATA_OFFSETS}"#,
    r#"["DTYPE",SHAPE,DATA_OFFSETS]"#,
    r#"[{"DTYPE":null},SHAPE,DATA_OFFSETS]"#,
];

const TOKENS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    " ",
    "\\",
    "0",
    "-",
    "1",
    "1.0",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "null",
    "true",
    "\"x\"",
    "\"\\u0078\"",
    "\"\\ud800\"",
    "\"__metadata__\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"F32\"",
    "\"dtype\":\"F32\",",
    "\"shape\":[2],",
    "\"data_offsets\":[0,8]",
    "\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}",
    "{\"F32\":null}",
    "\"__metadata__\":{\"a\":\"b\"},",
    "\"x\":[\"F32\",[2],[0,8]],",
    "[0,8]",
];
