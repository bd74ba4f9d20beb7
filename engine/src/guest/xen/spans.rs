//! A domain's memory as regions: one for each run of gfns that have memory. A region's name says where it begins.

use std::ops::Range;

use hybridmig_pager::xen::Span;
use hybridmig_transport::message::{RegionInfo, RegionKind};

use crate::blocks::{BlockSet, Blocks, RegionId};

/// The most runs: a domain with more has a balloon that has left holes everywhere.
pub const MAX_RUNS: usize = 256;
/// Gfns that the toolstack and Xen use: rings, the store, what firmware would have. They move before the domain runs,
/// and are never paged.
const SPECIAL: Range<u64> = 0xf_0000..0x10_0000;
/// What names begin with.
const PREFIX: &str = "gfn-";

/// The regions of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// From runs of gfns, in order. What is special is apart from what is not; `ring`, which the destination's pager
    /// and Xen share, is left out (0: there is none).
    pub fn of_runs(runs: &[Range<u64>], ring: u64) -> Result<Self, String> {
        let ring = if ring == 0 { u64::MAX - 1 } else { ring };
        let mut spans = Vec::new();
        for run in runs {
            let mut cuts = [
                run.start,
                SPECIAL.start,
                SPECIAL.end,
                ring,
                ring + 1,
                run.end,
            ];
            cuts.sort_unstable();
            let within = cuts.map(|cut| cut.clamp(run.start, run.end));
            let parts = within
                .windows(2)
                .filter(|part| part[0] < part[1] && part[0] != ring);
            for part in parts {
                let blocks = u32::try_from(part[1] - part[0]);
                spans.push(Span {
                    first: part[0],
                    blocks: blocks.map_err(|_| "the domain is too large".to_owned())?,
                });
            }
        }
        if spans.is_empty() || spans.len() > MAX_RUNS {
            return Err(format!(
                "the domain's memory is in {} pieces, 1 to {MAX_RUNS} are possible: has its balloon left holes? \
                 Give it its \
                 memory back (xl mem-set) first",
                spans.len()
            ));
        }
        Ok(Self(spans))
    }

    /// From regions that another host names.
    pub fn of_regions(regions: &[RegionInfo]) -> Result<Self, String> {
        let mut spans: Vec<Span> = Vec::new();
        for region in regions {
            let name = &region.name;
            let first = name
                .strip_prefix(PREFIX)
                .and_then(|gfn| u64::from_str_radix(gfn, 16).ok())
                .filter(|gfn| *gfn < 1 << 40);
            let after = spans
                .last()
                .map_or(0, |span| span.first + u64::from(span.blocks));
            let fits =
                region.kind == RegionKind::Memory && region.block_size == 4096 && region.blocks > 0;
            match first {
                Some(first) if fits && first >= after => spans.push(Span {
                    first,
                    blocks: region.blocks,
                }),
                _ => {
                    return Err(format!(
                        "'{name}' is no run of a Xen domain's memory, after {after:#x}"
                    ));
                }
            }
        }
        if spans.is_empty() || spans.len() > MAX_RUNS {
            return Err(format!("a domain with {} runs of memory", spans.len()));
        }
        Ok(Self(spans))
    }

    /// As regions.
    pub fn regions(&self) -> Vec<RegionInfo> {
        (0..)
            .zip(&self.0)
            .map(|(id, span)| RegionInfo {
                id: RegionId(id),
                kind: RegionKind::Memory,
                name: format!("{PREFIX}{:x}", span.first),
                blocks: span.blocks,
                block_size: 4096,
            })
            .collect()
    }

    /// As spans.
    pub fn spans(&self) -> &[Span] {
        &self.0
    }

    /// As runs of gfns.
    pub fn runs(&self) -> Vec<Range<u64>> {
        let run = |span: &Span| span.first..span.first + u64::from(span.blocks);
        self.0.iter().map(run).collect()
    }

    /// One more than the highest gfn.
    pub fn end(&self) -> u64 {
        self.runs().last().map_or(0, |run| run.end)
    }

    /// All pages, in number.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|span| u64::from(span.blocks)).sum()
    }

    /// Where a region's block lies.
    pub fn gfn(&self, region: RegionId, block: u32) -> Option<u64> {
        let span = self.0.get(usize::from(region.0))?;
        (block < span.blocks).then(|| span.first + u64::from(block))
    }

    /// Whether a gfn is one of the blocks.
    pub fn covers(&self, gfn: u64) -> bool {
        self.0.iter().any(|span| span.block(gfn).is_some())
    }

    /// All blocks.
    pub fn all(&self) -> Blocks {
        self.filtered(|_| true)
    }

    /// The blocks that are never paged.
    pub fn special(&self) -> Blocks {
        self.filtered(|span| SPECIAL.contains(&span.first))
    }

    /// The same as gfns.
    pub fn special_gfns(&self) -> BlockSet {
        let special = self
            .runs()
            .into_iter()
            .filter(|run| SPECIAL.contains(&run.start));
        special.flatten().map(|gfn| gfn as u32).collect()
    }

    fn filtered(&self, keep: impl Fn(&Span) -> bool) -> Blocks {
        let spans = (0..).zip(&self.0).filter(|(_, span)| keep(span));
        spans
            .map(|(id, span)| (RegionId(id), (0..span.blocks).collect()))
            .collect()
    }

    /// Gfns as blocks; those outside are dropped: nobody has asked for them.
    pub fn blocks(&self, gfns: &BlockSet) -> Blocks {
        let mut blocks = Blocks::new();
        for (id, span) in (0..).zip(&self.0) {
            // A bitmap of gfns ends at 2^32 of them: 16 TiB.
            let (first, end) = (
                span.first as u32,
                (span.first + u64::from(span.blocks)) as u32,
            );
            let set: BlockSet = gfns.range(first..end).map(|gfn| gfn - first).collect();
            if !set.is_empty() {
                *blocks.entry(RegionId(id)) = set;
            }
        }
        blocks
    }
}
