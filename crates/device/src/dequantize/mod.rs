//! Dequantization on the host: the bytes of a [`Recipe`]'s tensors become numbers.
//!
//! There are two executions. [`mod@reference`] is written to be read: it is what the word "correct" means for every other
//! one, those of devices included. [`dequantize`] is the fast one, equal to it in every bit, and what a load calls.

mod fast;
pub mod reference;

pub use fast::dequantize;

use tensorhaul_plan::Dtype;
use tensorhaul_plan::quant::{Recipe, Role};

/// The bytes of the tensors that a recipe reads, by role. Roles that it does not read stay empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sources<'a> {
    /// [`Role::Payload`].
    pub payload: &'a [u8],
    /// [`Role::Scale`].
    pub scale: &'a [u8],
    /// [`Role::Global`].
    pub global: &'a [u8],
    /// [`Role::ZeroPoint`].
    pub zero_point: &'a [u8],
    /// [`Role::GroupIndex`].
    pub group_index: &'a [u8],
    /// [`Role::Bias`].
    pub bias: &'a [u8],
    /// [`Role::Table`].
    pub table: &'a [u8],
    /// [`Role::NestedTable`].
    pub nested_table: &'a [u8],
    /// [`Role::NestedScale`].
    pub nested_scale: &'a [u8],
    /// [`Role::Fold`].
    pub fold: &'a [u8],
}

impl<'a> Sources<'a> {
    /// Returns the bytes of a role, none for one that is never read.
    pub fn of(&self, role: Role) -> &'a [u8] {
        match role {
            Role::Payload => self.payload,
            Role::Scale => self.scale,
            Role::Global => self.global,
            Role::ZeroPoint => self.zero_point,
            Role::GroupIndex => self.group_index,
            Role::Bias => self.bias,
            Role::Table => self.table,
            Role::NestedTable => self.nested_table,
            Role::NestedScale => self.nested_scale,
            Role::Fold => self.fold,
            _ => &[],
        }
    }
}

impl<'a> FromIterator<(Role, &'a [u8])> for Sources<'a> {
    /// Takes each member of a group for what it is; roles that are never read are left out.
    fn from_iter<T: IntoIterator<Item = (Role, &'a [u8])>>(members: T) -> Self {
        let mut sources = Sources::default();
        for (role, bytes) in members {
            match role {
                Role::Payload => sources.payload = bytes,
                Role::Scale => sources.scale = bytes,
                Role::Global => sources.global = bytes,
                Role::ZeroPoint => sources.zero_point = bytes,
                Role::GroupIndex => sources.group_index = bytes,
                Role::Bias => sources.bias = bytes,
                Role::Table => sources.table = bytes,
                Role::NestedTable => sources.nested_table = bytes,
                Role::NestedScale => sources.nested_scale = bytes,
                Role::Fold => sources.fold = bytes,
                _ => {}
            }
        }
        sources
    }
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// F32, F16 or BF16.
    pub dtype: Dtype,
    /// Which index runs fastest.
    pub layout: Layout,
}

/// The order of a matrix's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[batch, rows, cols]`, as `nn.Linear.weight` is.
    Rows,
    /// `[batch, cols, rows]`: each matrix transposed.
    Columns,
}

/// Asserts what both executions rely on: every index of the recipe lies in its tensor.
fn check(recipe: &Recipe, sources: &Sources<'_>, output: Output, target: &[u8]) {
    let is_float = matches!(output.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
    assert!(is_float, "{} is not written, F32, F16 and BF16 are", output.dtype);
    for role in Role::READ {
        if let Some(least) = recipe.source_len_bytes(role) {
            let len_bytes = sources.of(role).len() as u64;
            assert!(len_bytes >= least, "{role:?} has {len_bytes} bytes, the recipe reads {least}");
        }
    }
    let len_bytes = target.len() as u64;
    assert_eq!(Some(len_bytes), recipe.target_len_bytes(output.dtype), "the target is as long as the result");
}
