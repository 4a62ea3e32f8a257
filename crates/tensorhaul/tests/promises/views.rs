//! What a tensor tells of itself: type, shape, elements, and the struct other frameworks take.

use half::{bf16, f16};
use tensorhaul::dlpack::FLAG_READ_ONLY;
use tensorhaul::{DeviceId, Dtype, Element, ErrorKind, Handover, LoadOptions, Loaded, Model, Preference};

use crate::common::{Folder, Stored, assert_same, encode, reference, stored};

#[test]
fn elements_of_every_type_are_the_files_numbers() {
    let wide = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let tensors = [
        of("u8", (0..100).map(|index| wide(index) as u8)),
        of("i8", (0..100).map(|index| wide(index) as i8)),
        of("u16", (0..100).map(|index| wide(index) as u16)),
        of("i16", (0..100).map(|index| wide(index) as i16)),
        of("u32", (0..100).map(|index| wide(index) as u32)),
        of("i32", (0..100).map(|index| wide(index) as i32)),
        of("u64", (0..100).map(wide)),
        of("i64", (0..100).map(|index| wide(index) as i64)),
        of("f16", (0..100).map(|index| f16::from_f64(index as f64 / 7.0))),
        of("bf16", (0..100).map(|index| bf16::from_f64(index as f64 / 7.0))),
        of("f32", (0..100).map(|index| index as f32 / 7.0)),
        of("f64", (0..100).map(|index| index as f64 / 7.0)),
    ];
    for loaded in every_hand_over(&tensors, 0) {
        check::<u8>(&loaded, "u8", |index| wide(index) as u8);
        check::<i8>(&loaded, "i8", |index| wide(index) as i8);
        check::<u16>(&loaded, "u16", |index| wide(index) as u16);
        check::<i16>(&loaded, "i16", |index| wide(index) as i16);
        check::<u32>(&loaded, "u32", |index| wide(index) as u32);
        check::<i32>(&loaded, "i32", |index| wide(index) as i32);
        check::<u64>(&loaded, "u64", wide);
        check::<i64>(&loaded, "i64", |index| wide(index) as i64);
        check::<f16>(&loaded, "f16", |index| f16::from_f64(index as f64 / 7.0));
        check::<bf16>(&loaded, "bf16", |index| bf16::from_f64(index as f64 / 7.0));
        check::<f32>(&loaded, "f32", |index| index as f32 / 7.0);
        check::<f64>(&loaded, "f64", |index| index as f64 / 7.0);
    }
}

#[test]
fn another_type_than_the_tensors_is_refused_by_name() {
    for loaded in every_hand_over(&[stored("w", Dtype::Bf16, &[4]), stored("codes", Dtype::F8E4m3, &[4])], 0)
    {
        let error = loaded.tensors.get("w").unwrap().as_slice::<f16>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest);
        assert_eq!(error.to_string(), "the tensor holds BF16, not F16");
        let error = loaded.tensors.get("codes").unwrap().to_vec::<u8>().unwrap_err();
        assert_eq!(error.to_string(), "the tensor holds F8_E4M3, not U8");
    }
}

#[test]
fn misaligned_tensors_are_realigned_privately_and_refused_as_a_slice_where_mapped() {
    let tensors = [
        stored("shift", Dtype::U8, &[1]),
        stored("f32", Dtype::F32, &[1000]),
        stored("f64", Dtype::F64, &[3]),
    ];
    for data_phase in [0, 1, 2, 3, 4, 6, 7, 4095] {
        for loaded in every_hand_over(&tensors, data_phase) {
            let tensor = loaded.tensors.get("f32").unwrap();
            let elements = tensor.to_vec::<f32>().unwrap();
            assert!(
                elements.iter().flat_map(|element| element.to_le_bytes()).eq(tensor
                    .bytes()
                    .unwrap()
                    .iter()
                    .copied())
            );
            match tensor.as_slice::<f32>() {
                Ok(slice) => assert!(slice.iter().zip(&elements).all(|(a, b)| a.to_bits() == b.to_bits())),
                Err(error) => {
                    assert!(tensor.is_mapped() && (data_phase + 1) % 4 != 0, "{error:?}");
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    assert!(error.to_string().contains("load privately"), "{error}");
                }
            }
            assert!(tensor.is_mapped() || tensor.address().is_multiple_of(4));
        }
    }
}

#[test]
fn private_tensors_are_aligned_for_device_kernels_as_their_file_offsets_are() {
    let tensors =
        [stored("a", Dtype::F32, &[64]), stored("b", Dtype::F32, &[20_000]), stored("c", Dtype::F16, &[5])];
    for loaded in every_hand_over(&tensors, 256) {
        let tensor = loaded.tensors.get("b").unwrap();
        assert!(tensor.address().is_multiple_of(256), "{:#x}", tensor.address());
    }
}

#[test]
fn scalars_and_empty_tensors_are_tensors() {
    let tensors = [
        stored("empty f32", Dtype::F32, &[0, 7]),
        stored("scalar", Dtype::F64, &[]),
        stored("empty u8", Dtype::U8, &[3, 0, 2]),
        stored("wide and empty", Dtype::I64, &[1 << 63, 0]),
        stored("last, empty", Dtype::Bf16, &[0]),
    ];
    for phase in [0, 1] {
        for loaded in every_hand_over(&tensors, phase) {
            let tensor = |name| loaded.tensors.get(name).unwrap();
            let scalar = tensor("scalar");
            assert_eq!((scalar.shape(), scalar.numel(), scalar.len_bytes()), (&[][..], 1, 8));
            assert_eq!(scalar.to_vec::<f64>().unwrap().len(), 1);
            for name in ["empty f32", "empty u8", "wide and empty", "last, empty"] {
                assert_eq!((tensor(name).numel(), tensor(name).len_bytes()), (0, 0), "{name}");
                assert!(tensor(name).bytes().unwrap().is_empty(), "{name}");
            }
            assert_eq!(tensor("empty f32").as_slice::<f32>().unwrap(), [0f32; 0]);
            assert_eq!(tensor("wide and empty").as_slice::<i64>().unwrap(), [0i64; 0]);
            assert_eq!(tensor("last, empty").to_vec::<bf16>().unwrap(), []);
            assert_eq!(tensor("empty u8").as_slice::<u8>().unwrap(), [0u8; 0]);
        }
    }
}

#[test]
fn a_checkpoint_of_nothing_but_empty_tensors_loads() {
    for loaded in
        every_hand_over(&[stored("a", Dtype::F32, &[0]), stored("layers.0.b", Dtype::F32, &[2, 0])], 3)
    {
        assert_eq!((loaded.tensors.len(), loaded.report.bytes, loaded.report.reads), (2, 0, 0));
    }
    for loaded in every_hand_over(&[], 0) {
        assert!(loaded.tensors.is_empty());
    }
}

#[test]
fn names_are_any_text() {
    let names = [
        "",
        " ",
        "__metadata",
        "__metadata__ ",
        "__METADATA__",
        "\u{feff}__metadata__",
        "層.0.重み",
        "🦙",
        "a\u{301}",
        "á",
        "quote\" and \\ and / and \u{1}",
        "../../etc/passwd",
        "weights[0-3]",
        "*",
        "line\nbreak",
        "nul\0",
    ];
    let tensors: Vec<Stored> = names.iter().map(|name| stored(name, Dtype::U8, &[5])).collect();
    let folder = Folder::on_disk();
    let path = folder.write("names.safetensors", &encode(&tensors, 0));
    let expected = reference(&[path]);
    for loaded in every_hand_over(&tensors, 0) {
        assert_same(loaded.tensors.iter(), &expected, "every name");
        assert!(loaded.tensors.get("__metadata__").is_none());
        for name in names {
            assert_eq!(loaded.tensors.get(name).unwrap().bytes().unwrap(), expected[name].2, "{name:?}");
        }
    }
    let model = Model::open(folder.path()).unwrap();
    for name in names {
        assert_eq!(model.tensor(name).unwrap().bytes().unwrap(), expected[name].2, "{name:?}");
    }
    let error = model.tensor("__metadata__").unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (ErrorKind::BadRequest, Some("__metadata__")));
}

#[test]
fn a_dlpack_export_describes_the_tensor_and_outlives_it() {
    let tensors = [
        stored("w", Dtype::F32, &[3, 4, 5]),
        stored("scalar", Dtype::Bf16, &[]),
        stored("none", Dtype::I64, &[2, 0]),
    ];
    for loaded in every_hand_over(&tensors, 0) {
        let is_mapped = loaded.tensors.get("w").unwrap().is_mapped();
        let (bytes, address) = {
            let tensor = loaded.tensors.get("w").unwrap();
            (tensor.bytes().unwrap().to_vec(), tensor.address())
        };
        let export = |name| loaded.tensors.get(name).unwrap().to_dlpack().unwrap();
        let (w, scalar, none) = (export("w"), export("scalar"), export("none"));
        drop(loaded);
        assert_eq!(w.managed().flags & FLAG_READ_ONLY != 0, is_mapped);
        let inside = &w.managed().dl_tensor;
        assert_eq!((inside.ndim, inside.dtype.code, inside.dtype.bits, inside.byte_offset), (3, 2, 32, 0));
        assert_eq!(inside.data.addr() as u64, address);
        // SAFETY: `ndim` entries, as the struct says.
        let shape = unsafe { std::slice::from_raw_parts(inside.shape, 3) };
        // SAFETY: as above.
        let strides = unsafe { std::slice::from_raw_parts(inside.strides, 3) };
        assert_eq!((shape, strides), (&[3i64, 4, 5][..], &[20i64, 5, 1][..]));
        // SAFETY: the bytes of the tensor, which the export keeps though tensors and model are gone.
        let exported = unsafe { std::slice::from_raw_parts(inside.data.cast::<u8>(), bytes.len()) };
        assert_eq!(exported, bytes);
        assert_eq!((scalar.managed().dl_tensor.ndim, scalar.managed().dl_tensor.dtype.code), (0, 4));
        assert_eq!(none.managed().dl_tensor.ndim, 2);
        // A consumer on another thread frees it.
        std::thread::spawn(move || {
            let deleter = w.managed().deleter.unwrap();
            // SAFETY: handed over just now, and deleted once.
            unsafe { deleter(w.into_raw().as_ptr()) };
        })
        .join()
        .unwrap();
    }
}

fn of<T: Element>(name: &str, elements: impl Iterator<Item = T>) -> Stored {
    let elements: Vec<T> = elements.collect();
    let bytes = bytemuck::cast_slice(&elements).to_vec();
    Stored { name: name.to_owned(), dtype: T::DTYPE, shape: vec![elements.len() as u64], bytes }
}

fn check<T: Element + PartialEq + std::fmt::Debug>(loaded: &Loaded, name: &str, element: impl Fn(u64) -> T) {
    let expected: Vec<T> = (0..100).map(element).collect();
    let tensor = loaded.tensors.get(name).unwrap();
    assert_eq!(tensor.to_vec::<T>().unwrap(), expected, "{name}");
    assert_eq!((tensor.dtype(), tensor.device(), tensor.numel()), (T::DTYPE, DeviceId::Host, 100));
    match tensor.as_slice::<T>() {
        Ok(slice) => assert_eq!(slice, expected, "{name}"),
        // 100 bytes before it leave it at a multiple of 4.
        Err(error) => assert!(tensor.is_mapped() && size_of::<T>() == 8, "{name}: {error:?}"),
    }
}

/// Loads a file of these tensors mapped, in place, and through the ring.
fn every_hand_over(tensors: &[Stored], data_phase: u64) -> Vec<Loaded> {
    let folder = Folder::on_disk();
    let path = folder.write("views.safetensors", &encode(tensors, data_phase));
    let private = LoadOptions::default().handover(Handover::Private);
    let ways = [
        LoadOptions::default().handover(Handover::Mapped),
        private.clone(),
        private.in_place(Preference::Off),
    ];
    ways.iter().map(|options| Model::open(&path).unwrap().load(options).unwrap()).collect()
}
