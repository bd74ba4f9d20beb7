//! Tests of [`super`]: every run of segments is compared with what a segmentation written down
//! here, byte by byte and without sharing code with the one under test, makes of the same packet.

use proptest::prelude::*;

use super::*;

/// A super-packet to be made.
#[derive(Clone, Debug)]
struct Plan {
    v6: bool,
    tcp: bool,
    /// Bytes of IPv4 options, or of IPv6 destination options: a multiple of 8.
    ip_options: usize,
    tcp_options: usize,
    flags: u8,
    id: u16,
    sequence: u32,
    size: usize,
    payload: Vec<u8>,
    addresses: [u8; 32],
}

fn plans() -> impl Strategy<Value = Plan> {
    (
        (any::<bool>(), any::<bool>(), 0..=4usize, 0..=10usize),
        (any::<u8>(), any::<u16>(), any::<u32>()),
        (1..=1460usize, 1..=12usize, any::<u64>(), any::<[u8; 32]>()),
        prop::collection::vec(any::<u8>(), 1..=1460),
    )
        .prop_map(
            |((v6, tcp, ip, tcp_options), (flags, id, sequence), sizes, pattern)| {
                let (size, segments, cut, addresses) = sizes;
                let length = (size * segments - (cut % size as u64) as usize).max(1);
                Plan {
                    v6,
                    tcp,
                    ip_options: ip * 8,
                    tcp_options: tcp_options * 4,
                    flags,
                    id,
                    sequence,
                    size,
                    payload: pattern.iter().copied().cycle().take(length).collect(),
                    addresses,
                }
            },
        )
}

impl Plan {
    /// A packet with complete checksums that carries `payload`, `offset` bytes into the stream and `index`
    /// packets into the row.
    fn packet(&self, index: usize, offset: usize, payload: &[u8], flags: u8) -> Vec<u8> {
        let mut packet = self.partial(index, offset, payload, flags);
        let start = packet.len() - payload.len() - self.transport_header();
        let at = start + if self.tcp { 16 } else { 6 };
        let checksum = !reference_sum(&[&packet[start..]]);
        let checksum = if checksum == 0 { 0xffff } else { checksum };
        packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    fn transport_header(&self) -> usize {
        if self.tcp { 20 + self.tcp_options } else { 8 }
    }

    fn ip_header(&self) -> usize {
        self.ip_options + if self.v6 { 40 } else { 20 }
    }

    /// The same with only the pseudo header's sum in the place of the checksum.
    fn partial(&self, index: usize, offset: usize, payload: &[u8], flags: u8) -> Vec<u8> {
        let transport_length = self.transport_header() + payload.len();
        let protocol = if self.tcp { 6u8 } else { 17 };
        let mut packet = Vec::new();
        if self.v6 {
            let next = if self.ip_options > 0 { 60 } else { protocol };
            packet.extend([0x6a, 0xbc, 0xde, 0xf0]);
            packet.extend(((transport_length + self.ip_options) as u16).to_be_bytes());
            packet.extend([next, 61]);
            packet.extend(self.addresses);
            if self.ip_options > 0 {
                packet.extend([protocol, (self.ip_options / 8 - 1) as u8, 1]);
                packet.push((self.ip_options - 4) as u8);
                packet.resize(40 + self.ip_options, 0);
            }
        } else {
            packet.extend([0x45 + (self.ip_options / 4) as u8, 0x02]);
            packet.extend(((20 + self.ip_options + transport_length) as u16).to_be_bytes());
            packet.extend(self.id.wrapping_add(index as u16).to_be_bytes());
            packet.extend([0x40, 0, 61, protocol, 0, 0]);
            packet.extend(&self.addresses[..8]);
            packet.resize(20 + self.ip_options, 1);
            let checksum = !reference_sum(&[&packet]);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        let addresses = &self.addresses[..if self.v6 { 32 } else { 8 }];
        let pseudo = reference_sum(&[
            addresses,
            &[0, protocol],
            &(transport_length as u16).to_be_bytes(),
        ]);
        packet.extend([0x12, 0x34, 0x56, 0x78]);
        if self.tcp {
            packet.extend(self.sequence.wrapping_add(offset as u32).to_be_bytes());
            packet.extend([9, 9, 9, 9, (self.transport_header() * 4) as u8, flags]);
            packet.extend([0xff, 0xff]);
            packet.extend(pseudo.to_be_bytes());
            packet.extend([0, 0]);
            packet.resize(packet.len() + self.tcp_options, 1);
        } else {
            packet.extend((transport_length as u16).to_be_bytes());
            packet.extend(pseudo.to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    /// The frame that the kernel would hand over.
    fn frame(&self) -> Vec<u8> {
        let kind = match (self.tcp, self.v6) {
            (true, false) => 1u8,
            (true, true) => 4,
            (false, _) => 5,
        };
        let ecn = if self.tcp { self.flags & 0x80 } else { 0 };
        let mut frame = vec![1, kind | ecn];
        let checksum = if self.tcp { 16 } else { 6 };
        let headers = self.ip_header() + self.transport_header();
        for value in [headers, self.size, self.ip_header(), checksum] {
            frame.extend((value as u16).to_ne_bytes());
        }
        frame.extend(self.partial(0, 0, &self.payload, self.flags));
        frame
    }

    /// All packets of the super-packet.
    fn packets(&self) -> Vec<Vec<u8>> {
        let count = self.payload.len().div_ceil(self.size);
        let mut packets = Vec::new();
        for index in 0..count {
            let offset = index * self.size;
            let payload = &self.payload[offset..self.payload.len().min(offset + self.size)];
            let mut flags = self.flags;
            if index > 0 {
                flags &= 0x7f;
            }
            if index + 1 < count {
                flags &= 0xf6;
            }
            packets.push(self.packet(index, offset, payload, flags));
        }
        packets
    }
}

/// The one's complement sum over parts of an even length (but for the last).
fn reference_sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for (i, byte) in part.iter().enumerate() {
            sum += u32::from(*byte) << if i % 2 == 0 { 8 } else { 0 };
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    sum as u16
}

/// What the receiving kernel makes of a frame: its packets, each with complete checksums. It
/// segments by the frame's own header and must not know how the frame came to be.
fn receive(frame: &[u8]) -> Vec<Vec<u8>> {
    let value = |at: usize| usize::from(u16::from_ne_bytes([frame[at], frame[at + 1]]));
    let packet = &frame[10..];
    let (headers, size, start, offset) = (value(2), value(4), value(6), value(8));
    let v6 = packet[0] >> 4 == 6;
    let at = start + offset;
    if v6 {
        assert_eq!(
            usize::from(u16::from_be_bytes([packet[4], packet[5]])),
            packet.len() - 40
        );
    } else {
        assert_eq!(
            usize::from(u16::from_be_bytes([packet[2], packet[3]])),
            packet.len()
        );
        assert_eq!(reference_sum(&[&packet[..start.max(20)]]), 0xffff);
    }
    if frame[0] == 0 {
        return vec![packet.to_vec()];
    }
    assert_eq!(frame[0], 1);
    let payload = &packet[headers..];
    let tcp = offset == 16;
    let pieces: Vec<&[u8]> = if frame[1] == 0 {
        assert_eq!(size, 0);
        vec![payload]
    } else {
        assert_eq!(
            frame[1] & 0x7f,
            if !tcp {
                5
            } else if v6 {
                4
            } else {
                1
            }
        );
        // The bit may only be there for a packet with CWR.
        assert!(frame[1] & 0x80 == 0 || packet[start + 13] & 0x80 != 0);
        payload.chunks(size).collect()
    };
    let count = pieces.len();
    let mut done = Vec::new();
    let mut carried = 0;
    for (i, piece) in pieces.into_iter().enumerate() {
        let mut one = packet[..headers].to_vec();
        one.extend(piece);
        let length = one.len();
        // The change of the length, taken out of the sum that the frame brought along: RFC 1624.
        let before = (packet.len() - start) as u16;
        let after = (length - start) as u16;
        let partial = [packet[at], packet[at + 1]];
        let partial = reference_sum(&[&partial, &(!before).to_be_bytes(), &after.to_be_bytes()]);
        one[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        if v6 {
            one[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
        } else {
            one[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            let id = u16::from_be_bytes([one[4], one[5]]).wrapping_add(i as u16);
            one[4..6].copy_from_slice(&id.to_be_bytes());
            one[10..12].fill(0);
            let checksum = !reference_sum(&[&one[..start]]);
            one[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        if tcp {
            let sequence = u32::from_be_bytes(one[start + 4..start + 8].try_into().unwrap());
            let sequence = sequence.wrapping_add(carried as u32);
            one[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
            if i > 0 {
                one[start + 13] &= 0x7f;
            }
            if i + 1 < count {
                one[start + 13] &= 0xf6;
            }
        } else {
            one[start + 4..start + 6].copy_from_slice(&after.to_be_bytes());
        }
        let checksum = !reference_sum(&[&one[start..]]);
        let checksum = if checksum == 0 { 0xffff } else { checksum };
        one[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        carried += piece.len();
        done.push(one);
    }
    done
}

/// Whether the transport's checksum is right, by the pseudo header as the receiver sees it.
fn checksum_is_right(plan: &Plan, packet: &[u8]) -> bool {
    let start = plan.ip_header();
    let addresses = if plan.v6 { 8..40 } else { 12..20 };
    let protocol = [0, if plan.tcp { 6 } else { 17 }];
    let length = ((packet.len() - start) as u16).to_be_bytes();
    reference_sum(&[&packet[addresses], &protocol, &length, &packet[start..]]) == 0xffff
}

/// The runs of consecutive survivors, split where `split` says so.
fn runs(count: usize, fates: &[(bool, bool)]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for index in 0..count {
        let (lost, split) = fates[index % fates.len()];
        match runs.last_mut() {
            _ if lost => {}
            Some(run) if run.end == index && !split => run.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn runs_are_received_as_the_packets_that_survived(
        plan in plans(),
        fates in prop::collection::vec((any::<bool>(), prop::bool::weighted(0.2)), 1..16),
    ) {
        let bytes = plan.frame();
        let frame = Frame::new(&bytes).unwrap();
        let packets = plan.packets();
        prop_assert_eq!(frame.segments(), packets.len());
        for (index, packet) in packets.iter().enumerate() {
            prop_assert!(checksum_is_right(&plan, packet));
            prop_assert_eq!(frame.segment_bytes(index), packet.len());
        }
        for run in runs(packets.len(), &fates) {
            let mut out = b"before".to_vec();
            frame.write_run(&run, &mut out);
            prop_assert_eq!(out.len() - 6, frame.run_length(&run));
            prop_assert_eq!(&receive(&out[6..]), &packets[run.clone()]);
            prop_assert!(!frame.is_whole(&run) || out[6..] == bytes);
        }
    }

    #[test]
    fn corrupt_segment_has_a_wrong_checksum_in_one_bit(plan in plans(), bits: u64, pick: usize) {
        let bytes = plan.frame();
        let frame = Frame::new(&bytes).unwrap();
        let packets = plan.packets();
        let index = pick % packets.len();
        let mut out = Vec::new();
        frame.write_corrupt(index, bits, &mut out);
        // No offload: the receiver has to look.
        prop_assert_eq!(&out[..HEADER], &[0; HEADER]);
        let corrupt = &out[HEADER..];
        let good = &packets[index];
        let ip = if plan.v6 { 40 } else { plan.ip_header() };
        prop_assert_eq!(&corrupt[..ip], &good[..ip]);
        let flipped: u32 = corrupt.iter().zip(good).map(|(a, b)| (a ^ b).count_ones()).sum();
        prop_assert_eq!(flipped, 1);
        // Extension headers are not covered by the checksum.
        let covered = corrupt[..plan.ip_header()] == good[..plan.ip_header()];
        prop_assert!(!covered || !checksum_is_right(&plan, corrupt));
    }

    #[test]
    fn packets_that_are_not_super_packets_pass_as_they_are(
        plan in plans(),
        header in prop::sample::select(vec![0u8, 1, 2]),
    ) {
        let mut bytes = plan.frame();
        bytes[0] = header;
        bytes[1] = 0;
        let frame = Frame::new(&bytes).unwrap();
        prop_assert_eq!(frame.segments(), 1);
        prop_assert_eq!(frame.segment_bytes(0), bytes.len() - HEADER);
        let mut out = Vec::new();
        frame.write_run(&(0..1), &mut out);
        prop_assert_eq!(out, bytes);
    }

    #[test]
    fn garbage_is_no_panic(
        plan in plans(),
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        length: prop::sample::Index,
        keep: bool,
        bits: u64,
    ) {
        let mut bytes = plan.frame();
        for (at, value) in noise {
            // Headers above all.
            let at = at.index(bytes.len().min(120));
            bytes[at] = value;
        }
        if !keep {
            bytes.truncate(length.index(bytes.len()));
        }
        if let Some(frame) = Frame::new(&bytes) {
            let count = frame.segments();
            prop_assert!(count >= 1);
            let mut total = 0;
            for index in 0..count {
                total += frame.segment_bytes(index);
                if index % 97 == 0 {
                    let mut out = Vec::new();
                    frame.write_run(&(index..count), &mut out);
                    prop_assert_eq!(out.len(), frame.run_length(&(index..count)));
                    frame.write_corrupt(index, bits, &mut out);
                }
            }
            prop_assert!(total >= bytes.len() - HEADER);
        }
    }
}

#[test]
fn noise_alone_is_no_panic() {
    let mut state = 1u64;
    for length in 0..300 {
        for _ in 0..20 {
            let mut bytes = Vec::new();
            for _ in 0..length {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                bytes.push((state >> 56) as u8);
            }
            let Some(frame) = Frame::new(&bytes) else {
                assert!(length <= HEADER);
                continue;
            };
            let mut out = Vec::new();
            frame.write_corrupt(frame.segments() - 1, state, &mut out);
        }
    }
}
