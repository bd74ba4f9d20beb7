//! The ring on which Xen tells of faults and is answered: one page that it shares with the pager, eight slots of
//! `vm_event_st` for requests and responses alike (`xen/include/public/io/ring.h` and `vm_event.h`, interface 7, of
//! Xen 4.17). Behind the slots the page has room, where the pager notes who waits: a ring outlives its pager, and the
//! next one answers for it. This file must never write a slot whose request was not read yet, nor answer one twice.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// `VM_EVENT_INTERFACE_VERSION`. Xen drops responses with another one without a word.
pub const INTERFACE_VERSION: u32 = 7;
/// `VM_EVENT_REASON_MEM_PAGING`.
const REASON_MEM_PAGING: u32 = 3;
/// `VM_EVENT_FLAG_VCPU_PAUSED`: the vCPU waits, and is woken by the response.
pub const FLAG_VCPU_PAUSED: u32 = 1 << 0;
/// `VM_EVENT_FLAG_FOREIGN`: another domain touched the page.
pub const FLAG_FOREIGN: u32 = 1 << 1;
/// `MEM_PAGING_DROP_PAGE`: the guest gave the page back, nobody needs its content.
const DROP_PAGE: u32 = 1 << 0;

/// `HVM_PARAM_PAGING_RING_PFN`: which page of a domain the ring is in.
pub const PARAM_PAGING_RING: u32 = 27;
/// Bytes of the shared page.
pub const RING_BYTES: usize = 4096;
/// Bytes in front of the slots: four indices and padding.
const HEAD: usize = 64;
/// `sizeof(vm_event_st)`.
const SLOT: usize = 400;
/// The largest power of two of slots that fits (`__RING_SIZE`).
pub const SLOTS: u32 = 8;
/// Where the pager's notes are.
const NOTES: usize = HEAD + SLOTS as usize * SLOT;
const _: () = assert!(NOTES.is_multiple_of(8) && NOTES + size_of::<Notes>() <= RING_BYTES);
/// First word of notes that are valid.
const NOTES_MAGIC: u64 = u64::from_le_bytes(*b"hmpaging");

/// The indices in front of the slots. They only grow, and wrap.
#[repr(C)]
struct Head {
    req_prod: AtomicU32,
    req_event: AtomicU32,
    rsp_prod: AtomicU32,
    rsp_event: AtomicU32,
}

/// What the paging ring uses of `vm_event_st`; registers and other reasons' data follow in the slot.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Slot {
    version: u32,
    flags: u32,
    reason: u32,
    vcpu: u32,
    altp2m: u16,
    _padding: [u16; 3],
    gfn: u64,
    p2m_type: u32,
    paging_flags: u32,
}

/// What a pager leaves to the next one. Xen does not look at it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Notes {
    magic: u64,
    /// Next request to read.
    req_cons: u32,
    _padding: u32,
    /// Requests without an answer: no more than slots, since an answer frees a slot and nothing else does.
    waiting: [Note; SLOTS as usize],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Note {
    gfn: u64,
    used: u32,
    vcpu: u32,
    flags: u32,
    p2m_type: u32,
    dropped: u32,
    _padding: u32,
}

/// A page that somebody touched while it was paged out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which vCPU, of the domain or (with [`FLAG_FOREIGN`]) of the one that touched it.
    pub vcpu: u32,
    /// `VM_EVENT_FLAG_…`
    pub flags: u32,
    /// The page.
    pub gfn: u64,
    /// Xen's type of the page, to be returned.
    p2m_type: u32,
    /// Whether the page was given back instead of being wanted.
    pub dropped: bool,
}

impl Request {
    /// Whether a vCPU of the guest waits for it.
    pub fn vcpu_waits(&self) -> bool {
        self.flags & FLAG_VCPU_PAUSED != 0
    }
}

impl Request {
    /// Whether a slot is this request, or the answer to it.
    fn is(&self, slot: &Slot) -> bool {
        (self.gfn, self.vcpu, self.p2m_type) == (slot.gfn, slot.vcpu, slot.p2m_type)
    }
}

impl From<Request> for Note {
    fn from(request: Request) -> Self {
        Self {
            gfn: request.gfn,
            used: 1,
            vcpu: request.vcpu,
            flags: request.flags,
            p2m_type: request.p2m_type,
            dropped: u32::from(request.dropped),
            _padding: 0,
        }
    }
}

impl From<Note> for Request {
    fn from(note: Note) -> Self {
        Self {
            vcpu: note.vcpu,
            flags: note.flags,
            gfn: note.gfn,
            p2m_type: note.p2m_type,
            dropped: note.dropped != 0,
        }
    }
}

/// What is on the ring cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The hypervisor speaks another version.
    #[error(
        "the hypervisor's vm_event interface is version {0}, this program knows {INTERFACE_VERSION}: use the \
         one that was built \
         for this Xen"
    )]
    Version(u32),
    /// Not about paging.
    #[error("an event for reason {0} is on the paging ring")]
    Reason(u32),
    /// The notes of the pager before do not fit the ring.
    #[error("what the pager before has noted does not fit the ring: {0}")]
    Notes(&'static str),
    /// More requests than slots.
    #[error("{0} requests at once are on a ring of {SLOTS} slots")]
    Overrun(u32),
}

/// The pager's end of the ring.
pub struct BackRing {
    page: NonNull<u8>,
    /// Next request to read.
    req_cons: u32,
    /// Next response to write.
    rsp_prod: u32,
}

// SAFETY: the page is shared with the hypervisor only, and every access of ours goes through `&mut self`.
unsafe impl Send for BackRing {}

impl BackRing {
    /// Begins with an empty ring in that page.
    ///
    /// # Safety
    /// `page` is a mapping of [`RING_BYTES`] bytes, aligned to them, writable, that outlives this value, and nothing
    /// else in this process uses it. Xen may write it at any time.
    pub unsafe fn init(page: NonNull<u8>) -> Self {
        let ring = Self {
            page,
            req_cons: 0,
            rsp_prod: 0,
        };
        let head = ring.head();
        head.req_prod.store(0, Ordering::Relaxed);
        head.rsp_prod.store(0, Ordering::Relaxed);
        head.req_event.store(1, Ordering::Relaxed);
        head.rsp_event.store(1, Ordering::Release);
        let notes = Notes {
            magic: NOTES_MAGIC,
            req_cons: 0,
            _padding: 0,
            waiting: [Note::default(); SLOTS as usize],
        };
        // SAFETY: as in `head`; Xen does not use this part of the page.
        unsafe { ring.notes().write_volatile(notes) };
        ring
    }

    /// Goes on with the ring of a pager that has ended, however it ended. Returns the requests that it had read and
    /// not answered.
    ///
    /// # Errors
    /// When no pager has noted anything in this page, or what cannot be.
    ///
    /// # Safety
    /// As [`Self::init`]; and the other pager has ended.
    pub unsafe fn resume(page: NonNull<u8>) -> Result<(Self, Vec<Request>), RingError> {
        let mut ring = Self {
            page,
            req_cons: 0,
            rsp_prod: 0,
        };
        ring.rsp_prod = ring.head().rsp_prod.load(Ordering::Acquire);
        // SAFETY: as in `init`.
        let notes = unsafe { ring.notes().read_volatile() };
        if notes.magic != NOTES_MAGIC {
            return Err(RingError::Notes("there are none"));
        }
        ring.req_cons = notes.req_cons;
        let mut waiting: Vec<(usize, Request)> = (0..)
            .zip(notes.waiting)
            .filter(|(_, note)| note.used == 1)
            .map(|(at, note)| (at, note.into()))
            .collect();
        let open = ring.req_cons.wrapping_sub(ring.rsp_prod) as usize;
        if waiting.len() == open + 1 {
            // It ended between a step and its note. Either the last request was noted and not yet counted as read, ...
            let next = ring.peek(ring.req_cons);
            let produced = ring.head().req_prod.load(Ordering::Acquire) != ring.req_cons;
            let last = ring.peek(ring.rsp_prod.wrapping_sub(1));
            let is = |slot: Slot| move |(_, request): &(usize, Request)| request.is(&slot);
            if produced && waiting.iter().any(is(next)) {
                ring.set_req_cons(notes.req_cons.wrapping_add(1));
            } else if let Some(at) = waiting.iter().position(is(last)) {
                // ... or the last answer was given, and the note not yet removed.
                let (at, _) = waiting.remove(at);
                ring.set_note(at, Note::default());
            }
        }
        if waiting.len() != ring.req_cons.wrapping_sub(ring.rsp_prod) as usize {
            return Err(RingError::Notes("another number of requests waits"));
        }
        Ok((
            ring,
            waiting.into_iter().map(|(_, request)| request).collect(),
        ))
    }

    fn notes(&self) -> NonNull<Notes> {
        // SAFETY: the offset lies in the page and is aligned (asserted above).
        unsafe { self.page.add(NOTES).cast() }
    }

    fn set_note(&mut self, at: usize, note: Note) {
        // SAFETY: `at` is less than the number of slots; the rest as in `init`.
        unsafe {
            let notes = self.notes().as_ptr();
            (&raw mut (*notes).waiting[at]).write_volatile(note);
        }
        // A process that is killed has done its stores in order; the compiler must not change that.
        fence(Ordering::SeqCst);
    }

    fn note_at(&self, at: usize) -> Note {
        // SAFETY: as in `set_note`.
        unsafe { (&raw const (*self.notes().as_ptr()).waiting[at]).read_volatile() }
    }

    fn set_req_cons(&mut self, to: u32) {
        self.req_cons = to;
        // SAFETY: as in `set_note`.
        unsafe { (&raw mut (*self.notes().as_ptr()).req_cons).write_volatile(to) };
        fence(Ordering::SeqCst);
    }

    /// A slot as it is now.
    fn peek(&self, index: u32) -> Slot {
        // SAFETY: the slot lies in the page; any bytes are a slot.
        unsafe { self.slot(index).read_volatile() }
    }

    fn head(&self) -> &Head {
        // SAFETY: the page is mapped and aligned (see `init`); atomics may be shared with Xen.
        unsafe { self.page.cast::<Head>().as_ref() }
    }

    fn slot(&self, index: u32) -> NonNull<Slot> {
        let offset = HEAD + (index % SLOTS) as usize * SLOT;
        // SAFETY: the offset lies in the page (asserted above), and slots are aligned to 16 bytes.
        unsafe { self.page.add(offset).cast() }
    }

    /// The next request, if there is one.
    pub fn request(&mut self) -> Result<Option<Request>, RingError> {
        let produced = self.head().req_prod.load(Ordering::Acquire);
        let waiting = produced.wrapping_sub(self.req_cons);
        if waiting == 0 {
            // Xen is asked to signal the next one; it may just have come.
            self.head()
                .req_event
                .store(self.req_cons.wrapping_add(1), Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.head().req_prod.load(Ordering::Acquire) == self.req_cons {
                return Ok(None);
            }
            return self.request();
        }
        if waiting > SLOTS {
            return Err(RingError::Overrun(waiting));
        }
        // Xen has finished this request (acquired above). Copied once, so that no later look can differ.
        let slot = self.peek(self.req_cons);
        if slot.version != INTERFACE_VERSION {
            return Err(RingError::Version(slot.version));
        }
        if slot.reason != REASON_MEM_PAGING {
            return Err(RingError::Reason(slot.reason));
        }
        let request = Request {
            vcpu: slot.vcpu,
            flags: slot.flags,
            gfn: slot.gfn,
            p2m_type: slot.p2m_type,
            dropped: slot.paging_flags & DROP_PAGE != 0,
        };
        let free = (0..SLOTS as usize).find(|at| self.note_at(*at).used != 1);
        let Some(free) = free else {
            return Err(RingError::Overrun(SLOTS + 1));
        };
        self.set_note(free, request.into());
        self.set_req_cons(self.req_cons.wrapping_add(1));
        Ok(Some(request))
    }

    /// Answers a request that [`Self::request`] has returned, once. The hypervisor has to be notified afterwards.
    pub fn respond(&mut self, request: &Request) {
        let noted = (0..SLOTS as usize).find(|at| {
            let note = self.note_at(*at);
            note.used == 1 && Request::from(note) == *request
        });
        let Some(noted) = noted else {
            debug_assert!(false, "an answer without a request");
            return;
        };
        let slot = Slot {
            version: INTERFACE_VERSION,
            flags: request.flags & (FLAG_VCPU_PAUSED | FLAG_FOREIGN),
            reason: REASON_MEM_PAGING,
            vcpu: request.vcpu,
            altp2m: 0,
            _padding: [0; 3],
            gfn: request.gfn,
            p2m_type: request.p2m_type,
            paging_flags: if request.dropped { DROP_PAGE } else { 0 },
        };
        // SAFETY: every slot up to `req_cons` was read, and there is one response for each request at most: Xen does
        // not write this slot before it has read the response.
        unsafe { self.slot(self.rsp_prod).write_volatile(slot) };
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
        self.head().rsp_prod.store(self.rsp_prod, Ordering::Release);
        self.set_note(noted, Note::default());
    }
}

#[cfg(test)]
pub(super) mod model {
    //! Xen's end of the ring, as `xen/common/vm_event.c` behaves.

    use super::*;

    /// A page of a ring and the front end on it.
    pub struct FrontRing {
        page: Box<Page>,
        req_prod: u32,
        rsp_cons: u32,
    }

    #[repr(C, align(4096))]
    struct Page([u8; RING_BYTES]);

    impl FrontRing {
        pub fn new() -> Self {
            Self {
                page: Box::new(Page([0xa5; RING_BYTES])),
                req_prod: 0,
                rsp_cons: 0,
            }
        }

        pub fn page(&mut self) -> NonNull<u8> {
            NonNull::from(&mut self.page.0).cast()
        }

        fn at(&mut self, offset: usize) -> &mut [u8] {
            &mut self.page.0[offset..]
        }

        fn slot(index: u32) -> usize {
            64 + (index % 8) as usize * 400
        }

        /// `vm_event_put_request`, of bytes; false if there is no room.
        pub fn put(&mut self, vcpu: u32, flags: u32, gfn: u64, paging_flags: u32) -> bool {
            if self.req_prod.wrapping_sub(self.rsp_cons) == 8 {
                return false;
            }
            let at = Self::slot(self.req_prod);
            let words = [
                7,
                flags,
                3,
                vcpu,
                0,
                0,
                gfn as u32,
                (gfn >> 32) as u32,
                11,
                paging_flags,
            ];
            for (word, value) in words.into_iter().enumerate() {
                self.at(at + word * 4)[..4].copy_from_slice(&u32::to_le_bytes(value));
            }
            self.req_prod = self.req_prod.wrapping_add(1);
            let produced = self.req_prod.to_le_bytes();
            self.at(0)[..4].copy_from_slice(&produced);
            true
        }

        pub fn spoil(&mut self, index: u32, word: usize, value: u32) {
            let at = Self::slot(index) + word * 4;
            self.at(at)[..4].copy_from_slice(&value.to_le_bytes());
        }

        pub fn claim(&mut self, produced: u32) {
            self.at(0)[..4].copy_from_slice(&produced.to_le_bytes());
        }

        /// `vm_event_get_response`: version, flags, reason, vCPU, gfn and paging flags of each.
        pub fn responses(&mut self) -> Vec<(u32, u32, u32, u32, u64, u32)> {
            let word = |ring: &mut Self, at: usize| {
                u32::from_le_bytes(ring.at(at)[..4].try_into().unwrap())
            };
            let mut found = vec![];
            let produced = word(self, 8);
            while self.rsp_cons != produced {
                let at = Self::slot(self.rsp_cons);
                let words: Vec<u32> = (0..10).map(|n| word(self, at + 4 * n)).collect();
                let gfn = u64::from(words[6]) | u64::from(words[7]) << 32;
                found.push((words[0], words[1], words[2], words[3], gfn, words[9]));
                self.rsp_cons = self.rsp_cons.wrapping_add(1);
            }
            found
        }
    }
}

#[cfg(test)]
mod tests {
    use super::model::FrontRing;
    use super::*;

    fn ring(front: &mut FrontRing) -> BackRing {
        // SAFETY: the page outlives the ring in every test, and only both ends use it, one after the other.
        unsafe { BackRing::init(front.page()) }
    }

    #[test]
    fn the_layout_is_that_of_the_interface() {
        // Offsets printed by a C program on the headers of Xen 4.17: u at 24, 16 bytes of mem_paging in it.
        assert_eq!(std::mem::offset_of!(Slot, gfn), 24);
        assert_eq!(std::mem::size_of::<Slot>(), 24 + 16);
        assert_eq!(std::mem::size_of::<Head>(), 16);
    }

    #[test]
    fn requests_come_in_order_and_answers_carry_version_and_reason() {
        let mut front = FrontRing::new();
        let mut back = ring(&mut front);
        assert_eq!(back.request(), Ok(None));
        for round in 0..5_u64 {
            for n in 0..8 {
                assert!(front.put(n, FLAG_VCPU_PAUSED, round << 40 | u64::from(n), 0));
            }
            assert!(!front.put(9, 0, 9, 0), "the ring is full");
            let taken: Vec<Request> = (0..8).map(|_| back.request().unwrap().unwrap()).collect();
            assert_eq!(back.request(), Ok(None));
            // Answers in another order than the requests.
            for request in taken.iter().rev() {
                assert!(request.vcpu_waits() && !request.dropped);
                back.respond(request);
            }
            let answers = front.responses();
            let wanted: Vec<_> = (0..8)
                .rev()
                .map(|n: u32| (7, 1, 3, n, round << 40 | u64::from(n), 0))
                .collect();
            assert_eq!(answers, wanted);
        }
    }

    #[test]
    fn indices_wrap() {
        let mut front = FrontRing::new();
        let mut back = ring(&mut front);
        for n in 0..1000 {
            assert!(front.put(0, FLAG_VCPU_PAUSED | 1 << 9, n, 0));
            let request = back.request().unwrap().unwrap();
            back.respond(&request);
            // Flags that would have Xen do more than wake the vCPU are not returned.
            assert_eq!(front.responses(), [(7, 1, 3, 0, n, 0)]);
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        let mut front = FrontRing::new();
        let mut back = ring(&mut front);
        front.put(0, 0, 1, 1);
        assert!(back.request().unwrap().unwrap().dropped);
        front.put(0, 0, 2, 0);
        front.spoil(1, 0, 6);
        assert_eq!(back.request(), Err(RingError::Version(6)));
        front.spoil(1, 0, 7);
        front.spoil(1, 2, 1);
        assert_eq!(back.request(), Err(RingError::Reason(1)));
        front.claim(1 + 9);
        assert_eq!(back.request(), Err(RingError::Overrun(9)));
    }

    #[test]
    fn another_pager_answers_for_the_one_before() {
        let mut front = FrontRing::new();
        let mut back = ring(&mut front);
        for n in 0..3 {
            front.put(n as u32, FLAG_VCPU_PAUSED, n, 0);
        }
        let taken: Vec<Request> = (0..3).map(|_| back.request().unwrap().unwrap()).collect();
        // Not in the order in which they came: the slot of the first is written over.
        back.respond(&taken[2]);
        front.put(7, FLAG_VCPU_PAUSED, 70, 0);
        let _ = back;
        // SAFETY: as in `ring`.
        let (mut next, waiting) = unsafe { BackRing::resume(front.page()) }.unwrap();
        assert_eq!(waiting, taken[..2]);
        assert_eq!(next.request().unwrap().unwrap().gfn, 70);
        for request in &waiting {
            next.respond(request);
        }
        let gfns: Vec<u64> = front.responses().iter().map(|answer| answer.4).collect();
        assert_eq!(gfns, [2, 0, 1]);
    }

    #[test]
    fn a_pager_may_end_at_any_step() {
        for step in ["before the note is counted", "before the note is removed"] {
            let mut front = FrontRing::new();
            let mut back = ring(&mut front);
            front.put(0, FLAG_VCPU_PAUSED, 5, 0);
            front.put(1, FLAG_VCPU_PAUSED, 6, 0);
            let first = back.request().unwrap().unwrap();
            let second = back.request().unwrap().unwrap();
            let wanted = if step == "before the note is counted" {
                back.set_req_cons(1);
                vec![first, second]
            } else {
                back.respond(&first);
                back.set_note(0, first.into());
                vec![second]
            };
            // SAFETY: as in `ring`.
            let (mut next, waiting) = unsafe { BackRing::resume(front.page()) }.unwrap();
            assert_eq!(waiting, wanted, "{step}");
            assert_eq!(next.request(), Ok(None), "{step}");
            for request in &waiting {
                next.respond(request);
            }
            assert_eq!(front.responses().len(), 2, "{step}: one answer each");
        }
    }

    #[test]
    fn a_page_that_no_pager_has_used_is_not_gone_on_with() {
        let mut front = FrontRing::new();
        // SAFETY: as in `ring`.
        let refused = unsafe { BackRing::resume(front.page()) }.err();
        assert!(matches!(refused, Some(RingError::Notes(_))), "{refused:?}");
    }
}
