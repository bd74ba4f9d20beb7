//! Super-packets: what the kernel hands over as one packet of up to 64 KiB with a `virtio_net_hdr`
//! is a row of packets that each fit the MTU. This file says which, and makes a correct packet of
//! any run of them. Pure: no I/O, no clock; bytes that make no sense are one packet, never a panic.
//!
//! A [`Frame`] is what a TUN device with `IFF_VNET_HDR` reads and writes: [`HEADER`] bytes that say
//! which offloads the packet leaves to its receiver, then the IP packet.

use std::ops::Range;

/// Bytes of a `virtio_net_hdr` without `num_buffers`.
pub const HEADER: usize = 10;

/// The largest frame: the header, and an IPv6 packet with the longest payload without a jumbogram.
pub const MAX_FRAME: usize = HEADER + 40 + 65535;

/// The checksum of the packet is left to be computed from `csum_start` on.
const NEEDS_CHECKSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
/// Beside a TCP type: the first segment carries CWR.
const GSO_ECN: u8 = 0x80;

const TCP: u8 = 6;
const UDP: u8 = 17;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// One frame that was read, understood as far as need be.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    bytes: &'a [u8],
    /// `None`: one packet, to be passed on as it is.
    segmented: Option<Segmented>,
}

/// A super-packet of TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segmented {
    v6: bool,
    protocol: u8,
    /// Bytes of the IP header with its options or extension headers.
    ip: usize,
    /// Bytes of all headers, which every segment repeats.
    headers: usize,
    /// Bytes of payload, and how many of them a segment carries (the last one the rest).
    payload: usize,
    size: usize,
}

impl<'a> Frame<'a> {
    /// Understands a frame; `None` if it is too short to hold any packet.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() > HEADER).then(|| Self {
            bytes,
            segmented: Segmented::parse(bytes),
        })
    }

    /// Packets on the wire, at least one.
    pub fn segments(&self) -> usize {
        self.segmented.map_or(1, |s| s.payload.div_ceil(s.size))
    }

    /// Bytes of one of them on the wire, IP header included.
    pub fn segment_bytes(&self, index: usize) -> usize {
        match self.segmented {
            Some(s) => s.headers + s.payload_of(&(index..index + 1)).len(),
            None => self.bytes.len() - HEADER,
        }
    }

    /// Whether a run is the frame as it came.
    pub fn is_whole(&self, run: &Range<usize>) -> bool {
        *run == (0..self.segments())
    }

    /// The length of the frame that [`Self::write_run`] makes.
    pub fn run_length(&self, run: &Range<usize>) -> usize {
        match self.segmented {
            Some(s) => HEADER + s.headers + s.payload_of(run).len(),
            None => self.bytes.len(),
        }
    }

    /// Appends a frame that holds the consecutive segments `run`, and only these, to `out`.
    pub fn write_run(&self, run: &Range<usize>, out: &mut Vec<u8>) {
        let Some(s) = self.segmented.filter(|_| !self.is_whole(run)) else {
            out.extend_from_slice(self.bytes);
            return;
        };
        let start = out.len();
        let packet = &self.bytes[HEADER..];
        let payload = s.payload_of(run);
        out.resize(start + HEADER, 0);
        out.extend_from_slice(&packet[..s.headers]);
        out.extend_from_slice(&packet[s.headers + payload.start..s.headers + payload.end]);
        let (header, packet) = out[start..].split_at_mut(HEADER);
        s.rewrite(packet, run, self.segments());
        s.describe(header, self.bytes[1], payload.len(), run.start == 0);
    }

    /// Appends segment `index` as a frame of its own with one bit flipped behind the IP header, so
    /// that the receiver finds a wrong checksum. `bits` chooses the bit. The checksum is computed
    /// first: one that is left to the receiver would cover the flipped bit.
    pub fn write_corrupt(&self, index: usize, bits: u64, out: &mut Vec<u8>) {
        let start = out.len();
        self.write_run(&(index..index + 1), out);
        complete_checksum(&mut out[start..]);
        let packet = &mut out[start + HEADER..];
        let behind = ip_header_length(packet).unwrap_or(0);
        let behind = if behind < packet.len() { behind } else { 0 };
        let flippable = &mut packet[behind..];
        let bit = (bits % (flippable.len() as u64 * 8)) as usize;
        flippable[bit / 8] ^= 1 << (bit % 8);
    }
}

impl Segmented {
    /// The super-packet in a frame; `None` if it is not one, or one whose parts contradict each other.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, packet) = bytes.split_at_checked(HEADER)?;
        let kind = header[1] & !GSO_ECN;
        let size = usize::from(u16::from_ne_bytes([header[4], header[5]]));
        let checksum_start = usize::from(u16::from_ne_bytes([header[6], header[7]]));
        let checksum_offset = usize::from(u16::from_ne_bytes([header[8], header[9]]));
        if kind == GSO_NONE || size == 0 || header[0] & NEEDS_CHECKSUM == 0 {
            return None;
        }
        let (v6, ip, protocol) = parse_ip(packet)?;
        let transport = packet.get(ip..)?;
        let (transport_header, checksum_at) = match (kind, v6, protocol) {
            (GSO_TCP4, false, TCP) | (GSO_TCP6, true, TCP) => {
                let length = usize::from(*transport.get(12)? >> 4) * 4;
                ((length >= 20).then_some(length)?, 16)
            }
            (GSO_UDP, _, UDP) => {
                let length = usize::from(be16(transport, 4)?);
                ((length == transport.len()).then_some(8)?, 6)
            }
            _ => return None,
        };
        let headers = ip + transport_header;
        // No payload is no super-packet either.
        let payload = packet
            .len()
            .checked_sub(headers)
            .filter(|bytes| *bytes > 0)?;
        (checksum_start == ip && checksum_offset == checksum_at).then_some(Self {
            v6,
            protocol,
            ip,
            headers,
            payload,
            size,
        })
    }

    /// Where the payload of `run` lies in the whole payload.
    fn payload_of(&self, run: &Range<usize>) -> Range<usize> {
        let at = |index: usize| index.saturating_mul(self.size).min(self.payload);
        at(run.start)..at(run.end)
    }

    /// Makes the headers of `packet`, a copy of the super-packet's, those of `run` of `all` segments.
    fn rewrite(&self, packet: &mut [u8], run: &Range<usize>, all: usize) {
        let length = packet.len();
        if self.v6 {
            put16(packet, 4, (length - 40) as u16);
        } else {
            put16(packet, 2, length as u16);
            let id = u16::from_be_bytes([packet[4], packet[5]]);
            put16(packet, 4, id.wrapping_add(run.start as u16));
            put16(packet, 10, 0);
            let sum = fold(sum(0, &packet[..self.ip]));
            put16(packet, 10, !sum);
        }
        let pseudo = self.pseudo_header_sum(packet);
        let transport = &mut packet[self.ip..];
        if self.protocol == TCP {
            let sequence =
                u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            let sequence = sequence.wrapping_add((run.start * self.size) as u32);
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            if run.start > 0 {
                transport[13] &= !TCP_CWR;
            }
            if run.end < all {
                transport[13] &= !(TCP_FIN | TCP_PSH);
            }
            put16(transport, 16, pseudo);
        } else {
            put16(transport, 4, (length - self.ip) as u16);
            put16(transport, 6, pseudo);
        }
    }

    /// What stands in the checksum's place while the rest of it is left to be computed.
    fn pseudo_header_sum(&self, packet: &[u8]) -> u16 {
        let addresses = if self.v6 { 8..40 } else { 12..20 };
        let length = (packet.len() - self.ip) as u64;
        fold(sum(u64::from(self.protocol) + length, &packet[addresses]))
    }

    /// Writes the `virtio_net_hdr` of a packet that carries `payload` bytes.
    fn describe(&self, header: &mut [u8], kind: u8, payload: usize, first: bool) {
        let mut put = |at: usize, value: usize| {
            header[at..at + 2].copy_from_slice(&(value as u16).to_ne_bytes());
        };
        put(2, self.headers);
        put(4, if payload > self.size { self.size } else { 0 });
        put(6, self.ip);
        put(8, if self.protocol == TCP { 16 } else { 6 });
        header[0] = NEEDS_CHECKSUM;
        header[1] = match (payload > self.size, first) {
            (true, true) => kind,
            (true, false) => kind & !GSO_ECN,
            (false, _) => GSO_NONE,
        };
    }
}

/// The version (is it 6?), the length of the IP header with what belongs to it, and the protocol behind, of a
/// packet that is not a fragment and as long as it says.
fn parse_ip(packet: &[u8]) -> Option<(bool, usize, u8)> {
    match packet.first()? >> 4 {
        4 => {
            let length = usize::from(packet[0] & 0xf) * 4;
            // Neither more fragments to come nor an offset: the upper two bits are other flags.
            let unfragmented = be16(packet, 6)?.trailing_zeros() >= 14;
            let complete = usize::from(be16(packet, 2)?) == packet.len();
            let protocol = *packet.get(9)?;
            (length >= 20 && length <= packet.len() && unfragmented && complete)
                .then_some((false, length, protocol))
        }
        6 => {
            if usize::from(be16(packet, 4)?) + 40 != packet.len() {
                return None;
            }
            let mut protocol = *packet.get(6)?;
            let mut length = 40;
            // Hop-by-hop and destination options. (A routing header would change the destination that the
            // checksum covers.) Each takes at least eight bytes, so this ends.
            while matches!(protocol, 0 | 60) {
                protocol = *packet.get(length)?;
                length += (usize::from(*packet.get(length + 1)?) + 1) * 8;
            }
            Some((true, length, protocol))
        }
        _ => None,
    }
}

/// Bytes of the IP header alone.
fn ip_header_length(packet: &[u8]) -> Option<usize> {
    match packet.first()? >> 4 {
        4 => Some(usize::from(packet[0] & 0xf) * 4),
        6 => Some(40),
        _ => None,
    }
}

/// Computes the checksum that `frame` leaves to its receiver, if it does, and says that it is there.
fn complete_checksum(frame: &mut [u8]) {
    let (header, packet) = frame.split_at_mut(HEADER);
    if header[0] & NEEDS_CHECKSUM != 0 {
        let start = usize::from(u16::from_ne_bytes([header[6], header[7]]));
        let at = start + usize::from(u16::from_ne_bytes([header[8], header[9]]));
        if let Some(covered) = packet.get(start..)
            && at + 2 <= packet.len()
        {
            let checksum = !fold(sum(0, covered));
            // Zero would say "no checksum" in UDP, and is the same number.
            put16(packet, at, if checksum == 0 { 0xffff } else { checksum });
        }
    }
    header.fill(0);
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Adds the 16-bit words of `bytes`, the last one padded, to `sum`.
fn sum(sum: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(2);
    let odd = words.remainder().first();
    let odd = odd.map_or(0, |byte| u64::from(*byte) << 8);
    words.fold(sum + odd, |sum, word| {
        sum + u64::from(u16::from_be_bytes([word[0], word[1]]))
    })
}

/// The one's complement sum in 16 bits.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests;
