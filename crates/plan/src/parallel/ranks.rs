//! Who asks: a rank's place among those that share a model.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use super::ParallelError;

/// A rank's place in each of the three ways to share a model. They are independent of one another: 8 ranks that split attention by 8 and
/// experts by 8 have `tp` and `ep` of size 8 each, and keep their [experts whole](Ranks::whole_experts).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ranks {
    /// Which of `tp_size` equal shares of each matrix; from 0.
    pub tp_rank: u32,
    /// Ranks that share each matrix; at least 1.
    pub tp_size: u32,
    /// Which layers.
    pub layers: Layers,
    /// Which of `ep_size` equal shares of the experts; from 0.
    pub ep_rank: u32,
    /// Ranks that share the experts; at least 1.
    pub ep_size: u32,
    /// Whether each expert stays whole on its rank. Default: no, experts are cut by `tp_size` like any other matrix.
    pub has_whole_experts: bool,
}

/// Which layers a rank has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layers {
    /// An even share of them: stage `stage` of `size`, from 0; see [`Layers::range`].
    Stage {
        /// Which stage.
        stage: u32,
        /// Number of stages; at least 1.
        size: u32,
    },
    /// These, counted from 0. Layer 0 brings the embeddings, the last one the final norm and the head.
    Range(Range<u64>),
}

impl Ranks {
    /// A rank that has everything.
    pub fn alone() -> Ranks {
        Ranks {
            tp_rank: 0,
            tp_size: 1,
            layers: Layers::Stage { stage: 0, size: 1 },
            ep_rank: 0,
            ep_size: 1,
            has_whole_experts: false,
        }
    }

    /// Shares each matrix with `size` ranks.
    pub fn tp(self, rank: u32, size: u32) -> Ranks {
        Ranks { tp_rank: rank, tp_size: size, ..self }
    }

    /// Has the layers of one of `size` stages.
    pub fn pp(self, stage: u32, size: u32) -> Ranks {
        Ranks { layers: Layers::Stage { stage, size }, ..self }
    }

    /// Has these layers.
    pub fn layers(self, layers: Range<u64>) -> Ranks {
        Ranks { layers: Layers::Range(layers), ..self }
    }

    /// Shares the experts with `size` ranks.
    pub fn ep(self, rank: u32, size: u32) -> Ranks {
        Ranks { ep_rank: rank, ep_size: size, ..self }
    }

    /// Keeps each expert in one piece.
    pub fn whole_experts(self) -> Ranks {
        Ranks { has_whole_experts: true, ..self }
    }

    /// Returns all ranks of these sizes: stages outermost, experts in between, tensor-parallel ranks innermost.
    pub fn all(tp_size: u32, pp_size: u32, ep_size: u32) -> impl Iterator<Item = Ranks> {
        let of_stage = move |stage| {
            let of_experts =
                move |ep| (0..tp_size).map(move |tp| Ranks::alone().tp(tp, tp_size).ep(ep, ep_size));
            (0..ep_size).flat_map(of_experts).map(move |ranks| ranks.pp(stage, pp_size))
        };
        (0..pp_size).flat_map(of_stage)
    }

    /// Returns all ranks of a group like this one: of the same sizes, and of all stages, or of its range of layers. The order is that of
    /// [`Ranks::all`].
    ///
    /// Cut experts are shared beside everything else: `ep_size` times `tp_size` ranks a stage. [Whole](Ranks::whole_experts) ones go to the ranks of tensor
    /// and data parallelism one after the other, as runtimes have them: 8 ranks that share experts and are 4 groups of 2 in all else are
    /// 8 ranks, of which rank `r` is `tp r % 2` and `ep r`. Where more ranks share matrices than experts, neighbours have the same experts.
    ///
    /// # Errors
    /// As [`Ranks::check`]; [`ParallelError::UnlikeGroups`] where whole experts are shared by a number of ranks that is neither a multiple of `tp_size` nor
    /// a divisor of it.
    ///
    /// # Source
    /// vLLM, `docs/serving/expert_parallel_deployment.md`: the size of the expert-parallel group is that of tensor parallelism times that of data parallelism.
    pub fn group(&self) -> Result<Vec<Ranks>, ParallelError> {
        let (tp_size, ep_size) = (self.tp_size, self.ep_size);
        check("tensor-parallel rank", 0, tp_size)?;
        check("expert-parallel rank", 0, ep_size)?;
        let stages = match &self.layers {
            Layers::Stage { size, .. } => {
                check("pipeline stage", 0, *size)?;
                (0..*size).map(|stage| Layers::Stage { stage, size: *size }).collect()
            }
            range @ Layers::Range(_) => vec![range.clone()],
        };
        let places: Vec<(u32, u32)> = match self.has_whole_experts {
            false => (0..ep_size).flat_map(|ep| (0..tp_size).map(move |tp| (tp, ep))).collect(),
            true if ep_size.is_multiple_of(tp_size) => (0..ep_size).map(|ep| (ep % tp_size, ep)).collect(),
            true if tp_size.is_multiple_of(ep_size) => {
                (0..tp_size).map(|tp| (tp, tp / (tp_size / ep_size))).collect()
            }
            true => return Err(ParallelError::UnlikeGroups { tp_size, ep_size }),
        };
        let of_stage = |layers: Layers| {
            let place = move |(tp, ep): &(u32, u32)| {
                Ranks { layers: layers.clone(), ..self.clone() }.tp(*tp, tp_size).ep(*ep, ep_size)
            };
            places.iter().map(place)
        };
        Ok(stages.into_iter().flat_map(of_stage).collect())
    }

    /// Tells whether there is one rank alone, which has everything.
    pub fn is_alone(&self) -> bool {
        self.tp_size == 1 && self.ep_size == 1 && matches!(self.layers, Layers::Stage { size: 1, .. })
    }

    /// Checks that each rank is one of its group.
    ///
    /// # Errors
    /// [`ParallelError::EmptyGroup`] for a size of 0, [`ParallelError::RankOutside`] for a rank that is not below its size.
    pub fn check(&self) -> Result<(), ParallelError> {
        check("tensor-parallel rank", self.tp_rank, self.tp_size)?;
        check("expert-parallel rank", self.ep_rank, self.ep_size)?;
        match self.layers {
            Layers::Stage { stage, size } => check("pipeline stage", stage, size),
            Layers::Range(_) => Ok(()),
        }
    }
}

impl Layers {
    /// Returns the layers out of `count`.
    ///
    /// Stages are even; what is left over goes one each to the last stages but one, from behind: 10 layers in 4 stages are 2, 3, 3, 2.
    /// The last stage has the head as well, and the first one the embeddings.
    ///
    /// # Errors
    /// [`ParallelError::EmptyStage`] where there are fewer layers than stages, [`ParallelError::LayerRange`] for a range that is empty,
    /// backwards, or leaves the model.
    ///
    /// # Source
    /// vLLM 0.11, `vllm/distributed/utils.py`, `get_pp_indices`. What its `VLLM_PP_LAYER_PARTITION` says otherwise is a [range](Ranks::layers) here.
    pub fn range(&self, count: u64) -> Result<Range<u64>, ParallelError> {
        match *self {
            Layers::Stage { stage: 0, size: 1 } => Ok(0..count),
            Layers::Stage { size, .. } if count < u64::from(size) => {
                Err(ParallelError::EmptyStage { layers: count, pp_size: size })
            }
            Layers::Stage { stage, size } => {
                let (stage, size) = (u64::from(stage), u64::from(size));
                let (each, rest) = (count / size, count % size);
                // Stages `size - 1 - rest .. size - 1` have one more.
                let first = |stage: u64| stage * each + stage.saturating_sub(size - 1 - rest).min(rest);
                Ok(first(stage)..first(stage + 1))
            }
            Layers::Range(ref range) if range.start < range.end && range.end <= count => Ok(range.clone()),
            Layers::Range(Range { start, end }) => {
                Err(ParallelError::LayerRange { start, end, layers: count, predict_layers: 0 })
            }
        }
    }
}

impl fmt::Display for Ranks {
    /// Prints `tp 0/8, pp 0/1, ep 0/1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tp {}/{}, ", self.tp_rank, self.tp_size)?;
        match &self.layers {
            Layers::Stage { stage, size } => write!(f, "pp {stage}/{size}, ")?,
            Layers::Range(range) => write!(f, "layers {}..{}, ", range.start, range.end)?,
        }
        write!(f, "ep {}/{}", self.ep_rank, self.ep_size)?;
        if self.has_whole_experts { f.write_str(", whole experts") } else { Ok(()) }
    }
}

fn check(what: &'static str, rank: u32, size: u32) -> Result<(), ParallelError> {
    match size {
        0 => Err(ParallelError::EmptyGroup { what }),
        _ if rank >= size => Err(ParallelError::RankOutside { what, rank, size }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: u64, size: u32) -> Vec<u64> {
        let ranges = (0..size).map(|stage| Layers::Stage { stage, size }.range(count).unwrap());
        ranges.map(|range| range.end - range.start).collect()
    }

    #[test]
    fn layers_left_over_go_to_the_last_stages_but_one() {
        assert_eq!(lengths(32, 4), [8, 8, 8, 8]);
        assert_eq!(lengths(9, 4), [2, 2, 3, 2]);
        assert_eq!(lengths(10, 4), [2, 3, 3, 2]);
        assert_eq!(lengths(11, 4), [3, 3, 3, 2]);
        assert_eq!(lengths(61, 2), [31, 30]);
        assert_eq!(lengths(61, 8), [7, 7, 8, 8, 8, 8, 8, 7]);
    }

    #[test]
    fn stages_follow_one_another_without_a_gap() {
        for (count, size) in (1..40).flat_map(|count| (1..=8).map(move |size| (count, size))) {
            if count < u64::from(size) {
                let error = Layers::Stage { stage: 0, size }.range(count).unwrap_err();
                assert_eq!(error, ParallelError::EmptyStage { layers: count, pp_size: size });
                continue;
            }
            let mut next = 0;
            for stage in 0..size {
                let range = Layers::Stage { stage, size }.range(count).unwrap();
                assert_eq!(range.start, next);
                assert!(range.start < range.end);
                next = range.end;
            }
            assert_eq!(next, count);
        }
    }

    #[test]
    fn a_group_has_every_rank_once_and_whole_experts_spread_over_tensor_and_data_parallel_ranks() {
        let places = |ranks: Ranks| -> Vec<(u32, u32)> {
            let group = ranks.group().unwrap();
            group.iter().for_each(|ranks| ranks.check().unwrap());
            group.iter().map(|ranks| (ranks.tp_rank, ranks.ep_rank)).collect()
        };
        let ranks = |tp, ep| Ranks::alone().tp(0, tp).ep(0, ep);
        assert_eq!(places(ranks(2, 2)), [(0, 0), (1, 0), (0, 1), (1, 1)]);
        assert_eq!(places(ranks(2, 2).whole_experts()), [(0, 0), (1, 1)]);
        assert_eq!(places(ranks(2, 4).whole_experts()), [(0, 0), (1, 1), (0, 2), (1, 3)]);
        assert_eq!(places(ranks(4, 2).whole_experts()), [(0, 0), (1, 0), (2, 1), (3, 1)]);
        assert_eq!(places(ranks(3, 1).whole_experts()), [(0, 0), (1, 0), (2, 0)]);
        let product: Vec<Ranks> = Ranks::all(4, 3, 2).collect();
        assert_eq!(ranks(4, 2).pp(0, 3).group().unwrap(), product);
        let of_layers = ranks(2, 1).layers(3..5).group().unwrap();
        assert_eq!(of_layers, [0, 1].map(|rank| Ranks::alone().tp(rank, 2).layers(3..5)));
        assert_eq!(
            ranks(4, 6).whole_experts().group().unwrap_err().to_string(),
            "experts that stay whole are shared by the ranks of tensor and data parallelism together: 6 that share experts and 4 that share matrices must be a multiple of one another"
        );
        assert!(Ranks::alone().tp(0, 0).group().is_err());
    }

    #[test]
    fn ranks_outside_their_group_are_refused_with_the_numbers() {
        let text = |ranks: Ranks| ranks.check().unwrap_err().to_string();
        assert_eq!(
            text(Ranks::alone().tp(8, 8)),
            "tensor-parallel rank 8 is outside its group of 8 (0 to 7)"
        );
        assert_eq!(text(Ranks::alone().pp(1, 1)), "pipeline stage 1 is outside its group of 1 (0 to 0)");
        assert_eq!(
            text(Ranks::alone().ep(0, 0)),
            "expert-parallel rank: a group of 0 has no ranks; 1 is the least"
        );
        let empty = Ranks::alone().layers(3..3).layers.range(4).unwrap_err();
        assert_eq!(
            empty.to_string(),
            "layers 3..3 are none; give the first and the one behind the last: 0..4"
        );
        let of_none = Ranks::alone().layers(0..1).layers.range(0).unwrap_err();
        assert_eq!(of_none.to_string(), "layers 0..1 are not the model's, which has none");
    }
}
