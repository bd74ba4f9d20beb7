//! The stream that Xen's toolstack restores a domain from: what `xl save` writes, made here of a domain's records, with
//! every page announced and none in it. Formats: `docs/specs/libxc-migration-stream.pandoc` (version 3),
//! `docs/specs/libxl-migration-stream.pandoc` (version 2) and `struct save_file_header` of xl, all of Xen 4.17.
//!
//! It goes in two parts. The first ([`Prelude`]) makes the domain and gives it memory, long before it runs; the second
//! ([`Tail`]) is the state of the suspended domain, and ends the stream.

use std::ops::Range;

/// What an xl file begins with.
const XL_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
/// `SAVEFILE_BYTEORDER_VALUE`.
const XL_BYTE_ORDER: u32 = 0x0102_0304;
/// `XL_MANDATORY_FLAG_JSON | XL_MANDATORY_FLAG_STREAMv2`.
const XL_FLAGS: u32 = 3;
/// `RESTORE_STREAM_IDENT`, big endian: "LibxlFmt".
const LIBXL_IDENT: u64 = 0x4c69_6278_6c46_6d74;
const LIBXL_VERSION: u32 = 2;
const LIBXL_LIBXC_CONTEXT: u32 = 1;
const LIBXL_EMULATOR_CONTEXT: u32 = 3;
const LIBXL_END: u32 = 0;
/// `EMULATOR_QEMU_UPSTREAM`.
const QEMU: u64 = 2;
/// `IHDR_ID`, big endian: "XENF".
const LIBXC_ID: u32 = 0x5845_4e46;
const LIBXC_VERSION: u32 = 3;
/// `DHDR_TYPE_X86_HVM`, which PVH domains have as well.
const DOMAIN_HVM: u32 = 2;
const PAGE_SHIFT: u16 = 12;

const END: u32 = 0;
const PAGE_DATA: u32 = 1;
const TSC_INFO: u32 = 8;
const HVM_CONTEXT: u32 = 9;
const HVM_PARAMS: u32 = 0xa;
const STATIC_DATA_END: u32 = 0x10;
const CPUID_POLICY: u32 = 0x11;
const MSR_POLICY: u32 = 0x12;

/// The type of a page that is to be allocated and has no data in the stream (`XEN_DOMCTL_PFINFO_XALLOC`).
const XALLOC: u64 = 0xe << 60;
/// Pages that are announced by one record (`MAX_BATCH_SIZE`).
const BATCH: usize = 1024;
/// The parameters that move, in the order of `write_hvm_params` of libxenguest.
pub const PARAMS: [u32; 16] = [1, 5, 6, 27, 28, 29, 37, 17, 19, 9, 12, 34, 32, 33, 36, 38];
/// The longest HVM context that is accepted, in bytes: some 6 KiB are usual, and a little more for each vCPU.
const MAX_CONTEXT: usize = 16 << 20;
/// The longest state of a device model that is accepted, in bytes: some 100 KiB are usual.
pub const MAX_EMULATOR: usize = 64 << 20;

/// What is wrong with a state that has come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It ends within a record.
    #[error("the domain's state ends after {0} bytes, within a record")]
    Short(usize),
    /// A record that has no place there.
    #[error("the domain's state has a record of type {0:#x} where {1} was to be")]
    Record(u32, &'static str),
    /// A record of the wrong length.
    #[error("the record of type {0:#x} in the domain's state has {1} bytes")]
    Length(u32, usize),
}

/// The first part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prelude {
    /// The domain's configuration, as `xl list -l` shows it.
    pub config: String,
    /// Leaves of CPUID (X86_CPUID_POLICY); empty if not known.
    pub cpuid: Vec<u8>,
    /// MSRs (X86_MSR_POLICY); empty if not known.
    pub msrs: Vec<u8>,
    /// Version of the hypervisor that it comes from.
    pub xen: (u32, u32),
    /// The gfns that are to have memory.
    pub populated: Vec<Range<u64>>,
}

impl Prelude {
    /// As bytes for `xl restore`.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(XL_MAGIC);
        // xl reads it as a C string.
        let config = [self.config.as_bytes(), &[0]].concat();
        for word in [
            XL_BYTE_ORDER,
            XL_FLAGS,
            0,
            4 + config.len() as u32,
            config.len() as u32,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&config);
        out.extend_from_slice(&LIBXL_IDENT.to_be_bytes());
        out.extend_from_slice(&LIBXL_VERSION.to_be_bytes());
        out.extend_from_slice(&0_u32.to_be_bytes());
        record(&mut out, LIBXL_LIBXC_CONTEXT, &[]);
        out.extend_from_slice(&u64::MAX.to_be_bytes());
        out.extend_from_slice(&LIBXC_ID.to_be_bytes());
        out.extend_from_slice(&LIBXC_VERSION.to_be_bytes());
        // Options (little endian) and padding.
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&DOMAIN_HVM.to_le_bytes());
        out.extend_from_slice(&u32::from(PAGE_SHIFT).to_le_bytes());
        out.extend_from_slice(&self.xen.0.to_le_bytes());
        out.extend_from_slice(&self.xen.1.to_le_bytes());
        for (kind, policy) in [(CPUID_POLICY, &self.cpuid), (MSR_POLICY, &self.msrs)] {
            if !policy.is_empty() {
                record(&mut out, kind, policy);
            }
        }
        record(&mut out, STATIC_DATA_END, &[]);
        let gfns: Vec<u64> = self.populated.iter().cloned().flatten().collect();
        for batch in gfns.chunks(BATCH) {
            let mut body = Vec::with_capacity(8 + 8 * batch.len());
            body.extend_from_slice(&(batch.len() as u64).to_le_bytes());
            for gfn in batch {
                body.extend_from_slice(&(gfn | XALLOC).to_le_bytes());
            }
            record(&mut out, PAGE_DATA, &body);
        }
        out
    }
}

/// The second part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Mode, elapsed nanoseconds, kHz and incarnation of the TSC.
    pub tsc: (u32, u64, u32, u32),
    /// State of vCPUs and virtual devices.
    pub context: Vec<u8>,
    /// Parameters and their values, those that are not zero.
    pub params: Vec<(u32, u64)>,
    /// State of the device model (QEMU) of an HVM domain.
    pub emulator: Option<Vec<u8>>,
}

impl Tail {
    /// As bytes for `xl restore`, to the end of the stream. This is what moves as the guest's state.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let (mode, elapsed, khz, incarnation) = self.tsc;
        let mut tsc = Vec::new();
        tsc.extend_from_slice(&mode.to_le_bytes());
        tsc.extend_from_slice(&khz.to_le_bytes());
        tsc.extend_from_slice(&elapsed.to_le_bytes());
        tsc.extend_from_slice(&u64::from(incarnation).to_le_bytes());
        record(&mut out, TSC_INFO, &tsc);
        record(&mut out, HVM_CONTEXT, &self.context);
        let mut params = Vec::new();
        params.extend_from_slice(&(self.params.len() as u64).to_le_bytes());
        for (index, value) in &self.params {
            params.extend_from_slice(&u64::from(*index).to_le_bytes());
            params.extend_from_slice(&value.to_le_bytes());
        }
        record(&mut out, HVM_PARAMS, &params);
        record(&mut out, END, &[]);
        if let Some(emulator) = &self.emulator {
            // Which emulator, and which of them.
            let body = [&QEMU.to_le_bytes(), &emulator[..]].concat();
            record(&mut out, LIBXL_EMULATOR_CONTEXT, &body);
        }
        record(&mut out, LIBXL_END, &[]);
        out
    }

    /// From bytes that have come: before xl is given any of them.
    pub fn parse(bytes: &[u8]) -> Result<Self, StreamError> {
        let mut rest = Records { bytes, at: 0 };
        let tsc = rest.next(TSC_INFO, "TSC_INFO")?;
        if tsc.len() != 24 {
            return Err(StreamError::Length(TSC_INFO, tsc.len()));
        }
        let context = rest.next(HVM_CONTEXT, "HVM_CONTEXT")?;
        if context.is_empty() || context.len() > MAX_CONTEXT {
            return Err(StreamError::Length(HVM_CONTEXT, context.len()));
        }
        let params = rest.next(HVM_PARAMS, "HVM_PARAMS")?;
        let entries = params.len().saturating_sub(8) / 16;
        if params.len() != 8 + 16 * entries || word(params, 0) != entries as u64 {
            return Err(StreamError::Length(HVM_PARAMS, params.len()));
        }
        rest.end("the end of libxc's stream")?;
        let mut emulator = None;
        if rest.is_next(LIBXL_EMULATOR_CONTEXT) {
            let body = rest.next(LIBXL_EMULATOR_CONTEXT, "EMULATOR_CONTEXT")?;
            if body.len() <= 8 || body.len() > MAX_EMULATOR + 8 || word(body, 0) != QEMU {
                return Err(StreamError::Length(LIBXL_EMULATOR_CONTEXT, body.len()));
            }
            emulator = Some(body[8..].to_vec());
        }
        rest.end("the end of libxl's stream")?;
        if rest.at != bytes.len() {
            return Err(StreamError::Length(END, bytes.len() - rest.at));
        }
        let head = word(tsc, 0);
        Ok(Self {
            tsc: (
                head as u32,
                word(tsc, 8),
                (head >> 32) as u32,
                word(tsc, 16) as u32,
            ),
            context: context.to_vec(),
            params: (0..entries)
                .map(|entry| {
                    (
                        word(params, 8 + 16 * entry) as u32,
                        word(params, 16 + 16 * entry),
                    )
                })
                .collect(),
            emulator,
        })
    }
}

/// Appends a record, its body padded to a multiple of eight bytes.
fn record(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(body);
    out.resize(out.len() + body.len().next_multiple_of(8) - body.len(), 0);
}

/// Eight bytes of a body that is long enough.
fn word(body: &[u8], at: usize) -> u64 {
    let bytes = body[at..at + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    fn is_next(&self, kind: u32) -> bool {
        let head = self.bytes.get(self.at..self.at + 8);
        head.is_some_and(|head| word(head, 0) as u32 == kind)
    }

    fn end(&mut self, name: &'static str) -> Result<(), StreamError> {
        match self.next(END, name)? {
            [] => Ok(()),
            body => Err(StreamError::Length(END, body.len())),
        }
    }

    fn next(&mut self, wanted: u32, name: &'static str) -> Result<&'a [u8], StreamError> {
        let short = StreamError::Short(self.bytes.len());
        let head = self.bytes.get(self.at..self.at + 8).ok_or(short.clone())?;
        let head = word(head, 0);
        let (kind, len) = (head as u32, (head >> 32) as usize);
        if kind != wanted {
            return Err(StreamError::Record(kind, name));
        }
        let begin = self.at + 8;
        let end = begin + len;
        let body = self.bytes.get(begin..end).ok_or(short)?;
        self.at = begin + len.next_multiple_of(8);
        Ok(body)
    }
}
