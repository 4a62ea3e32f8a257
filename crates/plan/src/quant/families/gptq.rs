//! GPTQ: `qweight`, `qzeros`, `scales` and `g_idx`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::checkpoint::{Checkpoint, TensorId, TensorRef};
use crate::dtype::Dtype;
use crate::quant::config::{Config, GroupSize, Method, PackedRule, StoredZeros};
use crate::quant::scene::{
    Scene, ambiguous, check_dtype, check_shape, float_number, grid, group_size, members, missing, module,
    split, two_dims, unsupported, wrong_shape,
};
use crate::quant::values::{INDEX_LEN_BYTES_MAX, NEED_LEN_BYTES_MAX, Need, Values};
use crate::quant::{Codes, Element, Family, Group, QuantError, Recipe, Role, Scale, ZeroOffset, ZeroPoint};

/// For each rule of the configuration the zero-points and the indices of one module, which stand for all: what writers get wrong, they get
/// wrong everywhere.
#[derive(Debug, Default)]
pub(in crate::quant) struct Samples {
    by_rule: HashMap<usize, Sample>,
}

#[derive(Debug, Default)]
struct Sample {
    /// Of the first module.
    zeros: Option<TensorId>,
    /// Of the first module with more than one group: only there does an index say something.
    group_index: Option<TensorId>,
}

impl Samples {
    /// Takes what the sample of its rule lacks from the module of this tensor, and asks for its bytes.
    pub(in crate::quant) fn add(
        &mut self,
        checkpoint: &Checkpoint,
        config: &Config,
        payload: &TensorRef<'_>,
        needs: &mut Vec<Need>,
    ) {
        let (base, _) = split(payload.info.name);
        let find = |leaf: &str| checkpoint.find(&[base, leaf].concat());
        let mut ask = |tensor: TensorRef<'_>, len_bytes_max: u64| {
            let len_bytes = tensor.info.len_bytes().min(len_bytes_max);
            needs.push(Need { tensor: tensor.id, len_bytes });
            tensor.id
        };
        let sample = match self.by_rule.entry(rule_index(config, module(base))) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(first) => {
                let zeros = find("qzeros").map(|zeros| ask(zeros, NEED_LEN_BYTES_MAX));
                first.insert(Sample { zeros, group_index: None })
            }
        };
        if sample.group_index.is_none()
            && let Some(index) = find("g_idx")
            && find("scales").is_some_and(|scales| scales.info.shape.first() > Some(&1))
        {
            sample.group_index = Some(ask(index, INDEX_LEN_BYTES_MAX));
        }
    }
}

fn rule_index(config: &Config, module: &str) -> usize {
    match &config.method {
        Method::Packed(packed) => packed.rule_index(module),
        _ => 0,
    }
}

/// Joins a GPTQ module.
///
/// # Source
/// GPTQModel, commit f4c327a1: `nn_modules/qlinear/__init__.py`, `utils/model.py`, `utils/planar_packing.py`.
pub(in crate::quant) fn recognize(scene: &Scene<'_>, payload: &TensorRef<'_>) -> Result<Group, QuantError> {
    let (base, _) = split(payload.info.name);
    let rule_number = rule_index(scene.config, module(base));
    let rule = match &scene.config.method {
        Method::Packed(packed) => packed.rule(rule_number),
        _ => PackedRule::default(),
    };
    match payload.info.dtype {
        Dtype::I32 | Dtype::U32 => {}
        Dtype::I8 | Dtype::I16 | Dtype::I64 => {
            let what = format!("words of {} bits", payload.info.dtype.bits());
            return Err(unsupported("GPTQ", payload, what));
        }
        _ => check_dtype(payload, &[Dtype::I32])?,
    }
    let [words, rows] = two_dims(payload)?;
    let scales = scene.need(payload, base, "scales", "scales")?;
    let zeros = scene.find(base, "qzeros");
    let indices = scene.find(base, "g_idx");
    let number = float_number(&scales)?;
    let [groups, _] = two_dims(&scales)?;
    check_shape(&scales, &[groups, rows])?;

    let bits = bits(scene, payload, &rule, zeros.as_ref(), rows)?;
    let is_planar = rule.zeros == Some(StoredZeros::Planes);
    let cols = cols(payload, indices.as_ref(), words, bits)?;
    let per_group = columns_per_group(scene, &scales, &rule, cols, groups, indices.is_some())?;
    let sample = Sampled::read(scene, rule_number, &rule, bits, rows, per_group);
    let is_indexed = match indices.as_ref().filter(|_| groups > 1) {
        None => false,
        Some(indices) => sample.is_index_filled.ok_or_else(|| {
            let cols = INDEX_LEN_BYTES_MAX / 4;
            let readings =
                format!("an index that was never filled, or one whose first {cols} columns are of one group");
            ambiguous(indices, readings, "the rest of it, which is not read,")
        })?,
    };
    let zero_point = zero_point(scene, payload, &rule, zeros.as_ref(), &sample, bits, rows, groups)?;
    let is_zeros_read = matches!(zero_point, ZeroPoint::Packed { .. });
    let role = |is_read, role| if is_read { role } else { Role::Description };
    Ok(Group {
        name: [base, "weight"].concat(),
        shape: vec![rows, cols],
        family: Family::Gptq,
        bits,
        group_size: group_size(per_group, cols),
        is_plain_transposed: false,
        is_symmetric: Some(!is_zeros_read),
        members: members([
            (Role::Payload, Some(payload.id)),
            (Role::Scale, Some(scales.id)),
            (role(is_zeros_read, Role::ZeroPoint), zeros.map(|zeros| zeros.id)),
            (role(is_indexed, Role::GroupIndex), indices.map(|indices| indices.id)),
        ]),
        recipe: Recipe {
            zero_point,
            scale: Some(Scale { grid: grid(number, [1, per_group], [1, rows]), global: None }),
            // Below the number of scales, which fit the file; checked against u32 for the indices' own width.
            group_index: if is_indexed { Some(u32::try_from(groups).unwrap_or(u32::MAX)) } else { None },
            is_column_major: true,
            ..Recipe::of(
                rows,
                cols,
                if is_planar { Codes::ColumnPlanes { bits } } else { Codes::Columns { bits } },
                Element::Unsigned,
            )
        }
        .into(),
    })
}

/// Returns the width of a code, from the configuration, or from zero-points.
fn bits(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    rule: &PackedRule,
    zeros: Option<&TensorRef<'_>>,
    rows: u64,
) -> Result<u8, QuantError> {
    let is_planar = rule.zeros == Some(StoredZeros::Planes);
    let fits = |bits: u8| matches!(bits, 2 | 3 | 4 | 8) || is_planar && matches!(bits, 5..=7);
    let from_zeros = || {
        let [_, words] = two_dims(zeros?).ok()?;
        [2, 3, 4, 8].into_iter().find(|bits| (rows * u64::from(*bits)).div_ceil(32) == words)
    };
    match rule.bits {
        Some(bits) if fits(bits) => Ok(bits),
        Some(bits) => Err(QuantError::ConfigValue {
            file: scene.config.source.clone(),
            key: "bits".to_owned(),
            found: bits.to_string(),
            expected: "2, 3, 4 or 8 (5 to 7 with checkpoint_format gptq_p)".to_owned(),
        }),
        None => from_zeros()
            .ok_or_else(|| ambiguous(payload, "GPTQ of 2, 3, 4 or 8 bits", scene.config.key("bits"))),
    }
}

/// Returns the number of columns.
fn cols(
    payload: &TensorRef<'_>,
    indices: Option<&TensorRef<'_>>,
    words: u64,
    bits: u8,
) -> Result<u64, QuantError> {
    let bits = u64::from(bits);
    let Some(indices) = indices else {
        return match (words * 32).is_multiple_of(bits) {
            true => Ok(words * 32 / bits),
            false => Err(wrong_shape(payload, format!("a multiple of {bits} rows of words"))),
        };
    };
    check_dtype(indices, &[Dtype::I32])?;
    let [cols] = *indices.info.shape else { return Err(wrong_shape(indices, "one dim")) };
    match cols.checked_mul(bits).is_some_and(|bits| bits.div_ceil(32) == words) {
        true => Ok(cols),
        false => Err(wrong_shape(indices, format!("[{}], as many as columns,", words * 32 / bits))),
    }
}

/// Returns the columns that share a scale. What the configuration says must give the number of groups that the scales have.
pub(super) fn columns_per_group(
    scene: &Scene<'_>,
    scales: &TensorRef<'_>,
    rule: &PackedRule,
    cols: u64,
    groups: u64,
    is_indexed: bool,
) -> Result<u64, QuantError> {
    let per_group = match rule.group_size {
        Some(GroupSize::AllColumns) => cols,
        Some(GroupSize::Columns(size)) => u64::from(size).min(cols).max(1),
        None if groups == 1 => cols,
        // A short last group leaves more than one reading, but for powers of two.
        None if groups > 0 && cols.is_multiple_of(groups) && (cols / groups).is_power_of_two() => {
            cols / groups
        }
        None if groups > 0 && is_indexed => cols.div_ceil(groups),
        None => {
            let readings = format!("of several group sizes: {groups} groups of {cols} columns");
            return Err(ambiguous(scales, readings, scene.config.key("group_size")));
        }
    };
    match cols.div_ceil(per_group) == groups {
        true => Ok(per_group),
        false => {
            let expected =
                format!("{} groups, as {cols} columns by {per_group} have,", cols.div_ceil(per_group));
            Err(wrong_shape(scales, expected))
        }
    }
}

/// What the sample of a rule shows.
struct Sampled {
    /// Fields of stored zero-points that are the middle of the range, one less, and neither.
    middles: usize,
    below: usize,
    others: usize,
    /// Nothing where what was read of an index does not tell.
    is_index_filled: Option<bool>,
}

impl Sampled {
    fn read(
        scene: &Scene<'_>,
        rule_number: usize,
        rule: &PackedRule,
        bits: u8,
        rows: u64,
        per_group: u64,
    ) -> Sampled {
        let sample = scene.samples.by_rule.get(&rule_number);
        let bytes = |id: Option<TensorId>| id.and_then(|id| scene.values.get(id)).unwrap_or_default();
        let zeros = sample.and_then(|sample| sample.zeros).filter(|_| is_stream(rule, bits));
        let zeros = bytes(zeros);
        let middle = 1u32 << (bits - 1);
        let mut sampled = Sampled { middles: 0, below: 0, others: 0, is_index_filled: None };
        // Only fields of the first row: behind it the last word is padded.
        for field in fields(zeros, bits).take(usize::try_from(rows).unwrap_or(usize::MAX)) {
            match field {
                _ if field == middle => sampled.middles += 1,
                _ if field + 1 == middle => sampled.below += 1,
                _ => sampled.others += 1,
            }
        }
        let index = sample.and_then(|sample| sample.group_index);
        let indices = bytes(index);
        let is_whole = |id| scene.checkpoint.tensor(id).info.len_bytes() == indices.len() as u64;
        sampled.is_index_filled = match indices.is_empty() || indices.iter().any(|byte| *byte != 0) {
            // What nobody read is what it claims to be.
            true => Some(true),
            // One group has neither all columns of several groups, nor more than `per_group`.
            false if index.is_some_and(is_whole) || (indices.len() / 4) as u64 > per_group => Some(false),
            false => None,
        };
        sampled
    }

    fn is_empty(&self) -> bool {
        self.middles + self.below + self.others == 0
    }
}

/// Tells whether zero-points are a dense stream. Where a plane is a whole code, planes are one too.
fn is_stream(rule: &PackedRule, bits: u8) -> bool {
    rule.zeros != Some(StoredZeros::Planes) || matches!(bits, 2 | 4 | 8)
}

/// Walks a dense stream of fields, those that are whole.
fn fields(bytes: &[u8], bits: u8) -> impl Iterator<Item = u32> {
    let bits = usize::from(bits);
    (0..bytes.len() * 8 / bits).map(move |index| {
        let at = index * bits;
        let low = u32::from(bytes[at / 8]);
        let high = u32::from(bytes.get(at / 8 + 1).copied().unwrap_or(0));
        (low | high << 8) >> (at % 8) & ((1 << bits) - 1)
    })
}

/// Decides what is subtracted. A symmetric checkpoint's zero-points are the middle of the range whatever is stored, because labels
/// of the two formats are not reliable; unless what is stored is nowhere near.
#[allow(clippy::too_many_arguments)] // All of them decide.
fn zero_point(
    scene: &Scene<'_>,
    payload: &TensorRef<'_>,
    rule: &PackedRule,
    zeros: Option<&TensorRef<'_>>,
    sample: &Sampled,
    bits: u8,
    rows: u64,
    groups: u64,
) -> Result<ZeroPoint, QuantError> {
    let middle = ZeroPoint::Constant(1 << (bits - 1));
    let is_symmetric_sample = sample.others == 0 && !sample.is_empty();
    let is_flag_a_lie = sample.others > 0 && sample.middles + sample.below == 0;
    match rule.is_symmetric {
        Some(true) if !is_flag_a_lie => return Ok(middle),
        // Nothing says which of the two formats it is, and all fields are what one of them has for symmetric ones.
        _ if rule.zeros.is_none() && is_symmetric_sample => return Ok(middle),
        // Labelled as the other format than it is.
        None if is_symmetric_sample && rule.zeros == Some(StoredZeros::MinusOne) && sample.middles > 0 => {
            return Ok(middle);
        }
        None if is_symmetric_sample && rule.zeros != Some(StoredZeros::MinusOne) && sample.below > 0 => {
            return Ok(middle);
        }
        _ => {}
    }
    let base = split(payload.info.name).0;
    let Some(zeros) = zeros else {
        return Err(missing(payload, &[base, "qzeros"].concat(), "zero-points"));
    };
    check_dtype(zeros, &[Dtype::I32, Dtype::U32])?;
    let is_planar = !is_stream(rule, bits);
    let words = match is_planar {
        true => rows.div_ceil(32) * u64::from(bits),
        false => (rows * u64::from(bits)).div_ceil(32),
    };
    check_shape(zeros, &[groups, words])?;
    let offset = match rule.zeros {
        None => {
            let readings = "GPTQ of the first or the second format, whose zero-points differ by one";
            return Err(ambiguous(payload, readings, scene.config.key("checkpoint_format")));
        }
        Some(StoredZeros::MinusOne) if bits == 3 => ZeroOffset::Modular,
        Some(StoredZeros::MinusOne) => ZeroOffset::WordWise,
        Some(StoredZeros::Plain | StoredZeros::Planes) => ZeroOffset::Constant(0),
    };
    let row_stride_bytes = words * 4;
    let codes = match is_planar {
        true => Codes::RowPlanes { bits, row_stride_bytes },
        false => Codes::Rows { bits, row_stride_bytes },
    };
    Ok(ZeroPoint::Packed { codes, is_swapped: true, is_signed: false, offset })
}

/// Says what the samples show against the configuration.
pub(in crate::quant) fn warnings(
    config: &Config,
    samples: &Samples,
    values: &Values,
    checkpoint: &Checkpoint,
) -> Vec<String> {
    let Method::Packed(packed) = &config.method else { return Vec::new() };
    if !packed.is_gptq() {
        return Vec::new();
    }
    let mut warnings = Vec::new();
    let mut rules: Vec<_> = samples.by_rule.iter().collect();
    rules.sort_by_key(|(rule, _)| **rule);
    for (rule, sample) in rules {
        let rule = packed.rule(*rule);
        let (Some(zeros), Some(bits @ 2..=8)) = (sample.zeros, rule.bits) else { continue };
        let Some(bytes) = values.get(zeros) else { continue };
        let middle = 1u32 << (bits - 1);
        if !is_stream(&rule, bits) {
            continue;
        }
        let is_near = |field: u32| field == middle || field + 1 == middle;
        if rule.is_symmetric == Some(true) && !bytes.is_empty() && !fields(bytes, bits).any(is_near) {
            warnings.push(format!(
                "{}: sym is true, but no zero-point of {} is near {middle}; zero-points are read",
                config.source,
                checkpoint.tensor(zeros).info.name
            ));
        }
    }
    warnings
}
