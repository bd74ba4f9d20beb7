//! Counts of what the codec did, by codec, for reports.

use serde::{Deserialize, Serialize};

use super::wire::Codec;

/// Blocks and bytes of one codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecCount {
    /// Blocks (for the device state: pieces).
    pub blocks: u64,
    /// Bytes on the wire with the record's header, without QUIC's overhead.
    pub wire_bytes: u64,
    /// Bytes of contents that they stand for.
    pub plain_bytes: u64,
}

impl CodecCount {
    fn merge(&mut self, other: &Self) {
        self.blocks += other.blocks;
        self.wire_bytes += other.wire_bytes;
        self.plain_bytes += other.plain_bytes;
    }
}

/// Blocks and bytes by codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CodecStats {
    /// Zero blocks.
    pub zero: CodecCount,
    /// Blocks sent as they are.
    pub raw: CodecCount,
    /// Blocks sent compressed.
    pub zstd: CodecCount,
    /// Blocks sent as a difference.
    pub xor_zstd: CodecCount,
    /// Blocks named by content that was sent before.
    pub named: CodecCount,
    /// Pieces of the device state.
    pub state: CodecCount,
    /// Blocks named by content that the destination has in files of its own.
    pub seeded: CodecCount,
}

impl CodecStats {
    /// Adds `other` to this.
    pub fn merge(&mut self, other: &Self) {
        for codec in Self::CODECS {
            let add = *other.of(codec);
            self.of_mut(codec).merge(&add);
        }
    }

    /// The sum over all codecs.
    pub fn total(&self) -> CodecCount {
        let mut sum = CodecCount::default();
        for codec in Self::CODECS {
            sum.merge(self.of(codec));
        }
        sum
    }

    /// The counts of one codec.
    pub fn of(&self, codec: Codec) -> &CodecCount {
        match codec {
            Codec::Zero => &self.zero,
            Codec::Raw => &self.raw,
            Codec::Zstd => &self.zstd,
            Codec::XorZstd => &self.xor_zstd,
            Codec::Named => &self.named,
            Codec::State => &self.state,
            Codec::Seeded => &self.seeded,
        }
    }

    pub(super) fn of_mut(&mut self, codec: Codec) -> &mut CodecCount {
        match codec {
            Codec::Zero => &mut self.zero,
            Codec::Raw => &mut self.raw,
            Codec::Zstd => &mut self.zstd,
            Codec::XorZstd => &mut self.xor_zstd,
            Codec::Named => &mut self.named,
            Codec::State => &mut self.state,
            Codec::Seeded => &mut self.seeded,
        }
    }

    const CODECS: [Codec; 7] = [
        Codec::Zero,
        Codec::Raw,
        Codec::Zstd,
        Codec::XorZstd,
        Codec::Named,
        Codec::State,
        Codec::Seeded,
    ];
}
