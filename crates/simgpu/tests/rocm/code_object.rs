//! Writes code objects with nothing in them but what a driver reads before it runs anything.

/// Returns a code object for an architecture, with one kernel that takes one parameter of this length.
pub(crate) fn with_one_kernel(architecture: &str, name: &str, params_len: u8) -> Vec<u8> {
    let metadata = metadata(architecture, name, params_len);
    let mut note = Vec::new();
    for word in [7, metadata.len() as u32, 32] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"AMDGPU\0\0");
    note.extend(metadata);
    note.resize(note.len().next_multiple_of(4), 0);

    let mut image = b"\x7fELF\x02\x01\x01\x40\x03".to_vec();
    image.resize(64, 0);
    image[16..20].copy_from_slice(&[3, 0, 224, 0]); // A shared object of EM_AMDGPU.
    image[32] = 64; // Program headers follow.
    image[54] = 56;
    image[56] = 1;
    let mut header = [0; 56];
    header[0] = 4; // PT_NOTE
    header[8..16].copy_from_slice(&120u64.to_le_bytes());
    header[32..40].copy_from_slice(&(note.len() as u64).to_le_bytes());
    image.extend(header);
    image.extend(note);
    image
}

/// MessagePack, as the compiler writes it.
fn metadata(architecture: &str, name: &str, params_len: u8) -> Vec<u8> {
    let mut bytes = vec![0x82];
    text(&mut bytes, "amdhsa.kernels");
    bytes.extend([0x91, 0x83]);
    text(&mut bytes, ".args");
    bytes.extend([0x91, 0x83]);
    text(&mut bytes, ".offset");
    bytes.push(0);
    text(&mut bytes, ".size");
    bytes.push(params_len);
    text(&mut bytes, ".value_kind");
    text(&mut bytes, "by_value");
    text(&mut bytes, ".kernarg_segment_size");
    bytes.extend([0xcd, 0x01, params_len]); // The hidden arguments behind it take 256 bytes.
    text(&mut bytes, ".name");
    text(&mut bytes, name);
    text(&mut bytes, "amdhsa.target");
    text(&mut bytes, &format!("amdgcn-amd-amdhsa--{architecture}"));
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend([0xd9, text.len() as u8]);
    bytes.extend(text.as_bytes());
}
