//! What `inspect` says of quantized tensors.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde::Serialize;
use tensorhaul::quant::{Grid, Group, Part, Pass, Quantization};
use tensorhaul::{Model, TensorId};

use crate::output::{count, printable};

/// What is known, or why nothing is: a checkpoint with a configuration that makes no sense can still be looked at.
pub(crate) enum Quantized {
    Known(Arc<Quantization>),
    Unknown(String),
}

impl Quantized {
    pub(crate) fn of(model: &Model) -> Quantized {
        match model.quantization() {
            Ok(quantization) => Quantized::Known(quantization),
            Err(error) => Quantized::Unknown(error.one_line()),
        }
    }

    /// Tells whether there is anything to say.
    pub(crate) fn is_plain(&self) -> bool {
        match self {
            Quantized::Known(quantization) => quantization.is_empty(),
            Quantized::Unknown(_) => false,
        }
    }

    /// Says what a stored tensor is; nothing for one like any other.
    pub(crate) fn describe(&self, tensor: TensorId) -> String {
        let Quantized::Known(quantization) = self else { return String::new() };
        if quantization.refusal_of(tensor).is_some() {
            return "not dequantized, see below".to_owned();
        }
        match quantization.role_of(tensor) {
            Part::PassedThrough(Pass::Activation) => "scales activations".to_owned(),
            Part::PassedThrough(Pass::KvCache) => "scales keys or values".to_owned(),
            Part::PassedThrough(_) => "says that tensors are quantized".to_owned(),
            Part::Member(number) => {
                let group = &quantization.groups()[number as usize];
                match group.members.iter().find(|(_, member)| *member == tensor) {
                    Some(_) if group.payload() == tensor => {
                        format!("{} -> {} {:?}", format(group), printable(&group.name), group.shape)
                    }
                    Some((role, _)) => format!("{} of {}", role.name(), printable(&group.name)),
                    None => String::new(),
                }
            }
            _ => String::new(),
        }
    }

    /// Sums up, a line for each format, refusal and warning.
    pub(crate) fn summary(&self) -> String {
        let mut text = String::new();
        let quantization = match self {
            Quantized::Known(quantization) => quantization,
            Quantized::Unknown(why) => {
                let _ = writeln!(text, "quantization unknown: {}", printable(why));
                return text;
            }
        };
        let mut formats: BTreeMap<String, u64> = BTreeMap::new();
        for group in quantization.groups() {
            *formats.entry(format(group)).or_default() += 1;
        }
        for (format, tensors) in formats {
            let _ = writeln!(text, "quantized  {:>15}  {format}", count(tensors, "tensor"));
        }
        for refused in quantization.refused().iter().take(LISTED_MAX) {
            let _ = writeln!(text, "not dequantized: {}", printable(&refused.error.to_string()));
        }
        if quantization.refused().len() > LISTED_MAX {
            let more = quantization.refused().len() - LISTED_MAX;
            let _ = writeln!(text, "not dequantized: {more} more; --json lists all");
        }
        for warning in quantization.warnings() {
            let _ = writeln!(text, "warning: {}", printable(warning));
        }
        text
    }

    pub(crate) fn view(&self, model: &Model) -> View {
        match self {
            Quantized::Unknown(why) => View { error: Some(why.clone()), ..View::default() },
            Quantized::Known(quantization) => View {
                groups: quantization.groups().iter().map(|group| GroupView::of(group, model)).collect(),
                refused: quantization.refused().iter().map(|refused| refused.error.to_string()).collect(),
                warnings: quantization.warnings().to_vec(),
                error: None,
            },
        }
    }
}

/// Names a format as people do: `GPTQ 4-bit g128 sym`.
fn format(group: &Group) -> String {
    let mut text = format!("{} {}-bit", group.family, group.bits);
    match (group.group_size, group.recipe.scale.map(|scale| scale.grid)) {
        (Some(group_size), _) => _ = write!(text, " g{group_size}"),
        (None, Some(grid)) => text.push_str(&sharing(group, &grid)),
        (None, None) => {}
    }
    match group.is_symmetric {
        Some(true) => text.push_str(" sym"),
        Some(false) => text.push_str(" asym"),
        None => {}
    }
    if group.recipe.group_index.is_some() {
        text.push_str(" act-order");
    }
    text
}

/// Says which elements share a scale, where they are no groups of a row.
fn sharing(group: &Group, grid: &Grid) -> String {
    let (rows, cols) = (grid.rows_per_group, grid.cols_per_group);
    let (all_rows, all_cols) = (group.recipe.rows <= u64::from(rows), group.recipe.cols <= u64::from(cols));
    match (grid.row_stride, grid.col_stride) {
        (0, 0) => " per tensor".to_owned(),
        (_, 0) if rows == 1 => " per row".to_owned(),
        (0, _) if cols == 1 => " per column".to_owned(),
        _ if rows == 1 && all_cols => " per row".to_owned(),
        _ if cols == 1 && all_rows => " per column".to_owned(),
        _ => format!(" {rows}x{cols}"),
    }
}

/// The JSON of it.
#[derive(Default, Serialize)]
pub(crate) struct View {
    groups: Vec<GroupView>,
    refused: Vec<String>,
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct GroupView {
    name: String,
    shape: Vec<u64>,
    family: String,
    bits: u8,
    group_size: Option<u32>,
    symmetric: Option<bool>,
    act_order: bool,
    /// Role and name of each stored tensor.
    members: Vec<(&'static str, String)>,
}

impl GroupView {
    fn of(group: &Group, model: &Model) -> GroupView {
        let member = |(role, id): &(tensorhaul::quant::Role, TensorId)| {
            (role.name(), model.checkpoint().tensor(*id).info.name.to_owned())
        };
        GroupView {
            name: group.name.clone(),
            shape: group.shape.clone(),
            family: group.family.to_string(),
            bits: group.bits,
            group_size: group.group_size,
            symmetric: group.is_symmetric,
            act_order: group.recipe.group_index.is_some(),
            members: group.members.iter().map(member).collect(),
        }
    }
}

/// A model of a format that cannot be dequantized has thousands of tensors, for one reason.
const LISTED_MAX: usize = 8;
