// SPDX-License-Identifier: GPL-2.0

//! The walk of the guest's own page tables, guest-virtual to guest-physical, for instructions that
//! are emulated (SDM vol. 3, chapter 5).
//!
//! The tables lie in the guest's memory, which it may change at any moment: each entry is read once,
//! and accessed and dirty flags are set by compare-and-exchange.

use crate::x86::address::{Gpa, Gva, PAGE_SIZE};
use crate::x86::control::{physical_mask, Cr0, Cr3, Cr4, Efer, Illegal};
use crate::x86::vector::Exception;

/// The guest's memory. Every address is aligned to the size of what is there.
pub trait GuestPhysicalMemory {
    /// Why memory can't be reached: no slot, or its page can't be had.
    type Error;

    /// Reads 4 bytes, in one load.
    fn read_u32(&mut self, gpa: Gpa) -> Result<u32, Self::Error>;

    /// Reads 8 bytes, in one load.
    fn read_u64(&mut self, gpa: Gpa) -> Result<u64, Self::Error>;

    /// Replaces 4 bytes if they are still `old`, atomically, and says whether they were.
    fn compare_exchange_u32(&mut self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Self::Error>;

    /// Replaces 8 bytes if they are still `old`, atomically, and says whether they were.
    fn compare_exchange_u64(&mut self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Self::Error>;
}

/// The registers that paging hangs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// CR0: PG, WP.
    pub cr0: Cr0,
    /// CR3.
    pub cr3: Cr3,
    /// CR4: PSE, PAE, LA57, SMEP, SMAP, PKE.
    pub cr4: Cr4,
    /// EFER: LMA, NXE.
    pub efer: Efer,
    /// RFLAGS.AC, which lets a supervisor reach user pages under SMAP.
    pub alignment_check: bool,
    /// PKRU, which counts with CR4.PKE only.
    pub pkru: u32,
    /// The PDPTE registers, which count with PAE paging only.
    pub pdptes: [u64; 4],
    /// The guest's MAXPHYADDR.
    pub physical_bits: u32,
    /// Whether the CPU has 1 GiB pages.
    pub gbpages: bool,
}

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write, or the read of an instruction that will write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0 to 2.
    Supervisor,
    /// The CPU by itself, at whatever CPL: descriptor tables, the task-state segment.
    Implicit,
}

/// An access to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What.
    pub kind: AccessKind,
    /// Who.
    pub privilege: Privilege,
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMapping {
    /// The guest-physical address, offset included.
    pub gpa: Gpa,
    /// The size of the page in bytes, a power of two; all of the address space without paging.
    pub page_bytes: u64,
    /// Whether the entries allow writes.
    pub writable: bool,
    /// Whether the page is the user's.
    pub user: bool,
    /// Whether the entries allow execution.
    pub executable: bool,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError<E> {
    /// The guest gets this page fault.
    Fault(Exception),
    /// A table, at the address that is given, can't be reached.
    Memory(Gpa, E),
    /// The guest kept changing the entries: let it run, and it executes the instruction again.
    Contended,
}

/// Bits of page-table entries (SDM vol. 3, 5.5.4).
mod entry {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const LARGE: u64 = 1 << 7;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    /// The address of a table or small page.
    pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// The protection key's place.
    pub(super) const KEY_SHIFT: u32 = 59;
}

/// Bits of a page fault's error code (SDM vol. 3, 5.7).
mod code {
    pub(super) const PRESENT: u32 = 1 << 0;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
    pub(super) const KEY: u32 = 1 << 5;
}

/// Attempts to set accessed and dirty flags against a guest that changes the entries.
const ATTEMPTS: u32 = 8;
/// The most levels.
const MAX_LEVELS: usize = 5;

/// The ways of paging.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    Bits32,
    Pae,
    /// The number of levels, 4 or 5.
    Long(u32),
}

/// An entry that was used, and what it is to become.
#[derive(Clone, Copy, Default)]
struct Step {
    at: Gpa,
    entry: u64,
    new: u64,
}

/// The way that was walked, and what its entries say together. It is made once and filled in place:
/// to hand it back would copy it each time.
struct Path {
    /// The entries that have no accessed flag yet, or for a write the last one without a dirty flag.
    unmarked: [Step; MAX_LEVELS],
    count: usize,
    /// The bits that all entries have.
    common: u64,
    /// Whether an entry forbids execution.
    no_execute: u64,
    mapping: GuestMapping,
    key: u32,
}

impl Path {
    /// A path that has not begun: everything is allowed until an entry takes it away.
    fn new() -> Self {
        Self {
            unmarked: [Step::default(); MAX_LEVELS],
            count: 0,
            common: u64::MAX,
            no_execute: 0,
            mapping: GuestMapping {
                gpa: Gpa::new(0),
                page_bytes: PAGE_SIZE,
                writable: true,
                user: true,
                executable: true,
            },
            key: 0,
        }
    }

    /// Takes up an entry, whose flags in `marks` are to be set.
    #[inline]
    fn add(&mut self, at: Gpa, entry: u64, marks: u64) {
        let new = entry | marks;
        if new != entry {
            if let Some(step) = self.unmarked.get_mut(self.count) {
                *step = Step { at, entry, new };
                self.count = self.count.wrapping_add(1);
            }
        }
        self.common &= entry;
        self.no_execute |= entry & entry::NO_EXECUTE;
    }

    /// Ends at a page.
    #[inline]
    fn end(&mut self, page: u64, page_bytes: u64, gva: Gva) {
        let offset = page_bytes.wrapping_sub(1);
        self.mapping = GuestMapping {
            gpa: Gpa::new((page & !offset) | (gva.raw() & offset)),
            page_bytes,
            writable: self.common & entry::WRITE != 0,
            user: self.common & entry::USER != 0,
            executable: self.no_execute == 0,
        };
    }
}

/// Checks the PDPTEs that CR3 or a change of CR0 or CR4 loads with PAE paging: a present one with a
/// reserved bit raises #GP(0) (SDM vol. 3, 5.4.1).
pub fn check_pdptes(pdptes: &[u64; 4], physical_bits: u32) -> Result<(), Illegal> {
    let reserved = !physical_mask(physical_bits) | 0x1e6;
    let is_bad = |&pdpte: &u64| pdpte & entry::PRESENT != 0 && pdpte & reserved != 0;
    if pdptes.iter().any(is_bad) {
        return Err(Illegal);
    }
    Ok(())
}

/// Where the PDPTEs lie that CR3 refers to with PAE paging.
#[inline]
pub const fn pdptes_address(cr3: Cr3) -> Gpa {
    Gpa::new(cr3.0 & 0xffff_ffe0)
}

/// Translates an address for an access and marks the entries accessed, and for a write the page's
/// dirty. The caller has checked that `gva` is canonical.
pub fn walk<M: GuestPhysicalMemory>(
    memory: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
) -> Result<GuestMapping, WalkError<M::Error>> {
    for _ in 0..ATTEMPTS {
        let mut path = Path::new();
        find(memory, paging, gva, access, &mut path)?;
        if path.count == 0 || mark(memory, paging, &path)? {
            return Ok(path.mapping);
        }
    }
    Err(WalkError::Contended)
}

/// Translates an address for an access and changes nothing.
pub fn probe<M: GuestPhysicalMemory>(
    memory: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
) -> Result<GuestMapping, WalkError<M::Error>> {
    let mut path = Path::new();
    find(memory, paging, gva, access, &mut path)?;
    Ok(path.mapping)
}

/// Finds the way to the page and checks that the access may be.
fn find<M: GuestPhysicalMemory>(
    memory: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
    path: &mut Path,
) -> Result<(), WalkError<M::Error>> {
    match paging.mode() {
        Mode::Off => {
            path.mapping.gpa = Gpa::new(gva.raw() & 0xffff_ffff);
            path.mapping.page_bytes = 1 << 32;
            return Ok(());
        }
        Mode::Bits32 => descend_32(memory, paging, gva, access, path)?,
        Mode::Pae => {
            let pdpte = paging
                .pdptes
                .get(((gva.raw() >> 30) & 3) as usize)
                .copied()
                .unwrap_or(0);
            if pdpte & entry::PRESENT == 0 {
                return Err(paging.fault(gva, access, 0));
            }
            descend_64(memory, paging, gva, access, (pdpte, 2), path)?;
        }
        Mode::Long(levels) => {
            descend_64(memory, paging, gva, access, (paging.cr3.0, levels), path)?;
        }
    }
    match paging.violation(path, access) {
        Some(code) => Err(paging.fault(gva, access, code)),
        None => Ok(()),
    }
}

/// Descends through tables of 64-bit entries. `root` has the address of a table, and its level.
fn descend_64<M: GuestPhysicalMemory>(
    memory: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
    root: (u64, u32),
    path: &mut Path,
) -> Result<(), WalkError<M::Error>> {
    let (root, mut level) = root;
    let mut table = root & entry::ADDRESS & physical_mask(paging.physical_bits);
    let reserved = paging.reserved();
    loop {
        let shift = level.wrapping_mul(9).wrapping_add(3);
        let index = gva.raw().wrapping_shr(shift) & 511;
        let at = Gpa::new(table | (index << 3));
        let entry = memory
            .read_u64(at)
            .map_err(|error| WalkError::Memory(at, error))?;
        if entry & entry::PRESENT == 0 {
            return Err(paging.fault(gva, access, 0));
        }
        let is_large = entry & entry::LARGE != 0;
        let reserved = match is_large {
            true => reserved | paging.reserved_large(level),
            false => reserved,
        };
        if entry & reserved != 0 {
            let code = code::PRESENT | code::RESERVED;
            return Err(paging.fault(gva, access, code));
        }
        let is_last = level <= 1 || is_large;
        path.add(at, entry, marks(is_last, access.kind));
        if is_last {
            path.key = (entry.wrapping_shr(entry::KEY_SHIFT) & 0xf) as u32;
            path.end(entry & entry::ADDRESS, 1u64.wrapping_shl(shift), gva);
            return Ok(());
        }
        table = entry & entry::ADDRESS;
        level = level.wrapping_sub(1);
    }
}

/// Descends through the two levels of 32-bit paging (SDM vol. 3, 5.3).
fn descend_32<M: GuestPhysicalMemory>(
    memory: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
    path: &mut Path,
) -> Result<(), WalkError<M::Error>> {
    let mut read = |table: u64, shift: u32| {
        let index = gva.raw().wrapping_shr(shift) & 1023;
        let at = Gpa::new((table & 0xffff_f000) | (index << 2));
        match memory.read_u32(at) {
            Ok(entry) if u64::from(entry) & entry::PRESENT != 0 => Ok((at, u64::from(entry))),
            Ok(_) => Err(paging.fault(gva, access, 0)),
            Err(error) => Err(WalkError::Memory(at, error)),
        }
    };
    let (at, directory) = read(paging.cr3.0, 22)?;
    let is_large = directory & entry::LARGE != 0 && paging.cr4.has(Cr4::PSE);
    if is_large && directory & paging.reserved_4m() != 0 {
        let code = code::PRESENT | code::RESERVED;
        return Err(paging.fault(gva, access, code));
    }
    path.add(at, directory, marks(is_large, access.kind));
    if is_large {
        // Bits 20:13 hold the address's bits 39:32 (PSE-36).
        let high = (directory >> 13) & 0xff;
        path.end((directory & 0xffc0_0000) | (high << 32), 1 << 22, gva);
        return Ok(());
    }
    let (at, page) = read(directory, 12)?;
    path.add(at, page, marks(true, access.kind));
    path.end(page & 0xffff_f000, PAGE_SIZE, gva);
    Ok(())
}

/// The flags that an entry gets: accessed, and the last one for a write dirty.
#[inline]
const fn marks(is_last: bool, kind: AccessKind) -> u64 {
    match (is_last, kind) {
        (true, AccessKind::Write) => entry::ACCESSED | entry::DIRTY,
        _ => entry::ACCESSED,
    }
}

/// Sets the flags that the path's entries lack. `false` says that the guest changed an entry meanwhile.
#[cold]
fn mark<M: GuestPhysicalMemory>(
    memory: &mut M,
    paging: &Paging,
    path: &Path,
) -> Result<bool, WalkError<M::Error>> {
    let is_32 = paging.mode() == Mode::Bits32;
    for step in path.unmarked.iter().take(path.count) {
        let swapped = if is_32 {
            let (old, new) = (low_half(step.entry), low_half(step.new));
            memory.compare_exchange_u32(step.at, old, new)
        } else {
            memory.compare_exchange_u64(step.at, step.entry, step.new)
        };
        match swapped {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => return Err(WalkError::Memory(step.at, error)),
        }
    }
    Ok(true)
}

/// The lower half of an entry: all of it with 32-bit paging.
#[inline]
const fn low_half(entry: u64) -> u32 {
    (entry & 0xffff_ffff) as u32
}

impl Paging {
    #[inline]
    const fn mode(&self) -> Mode {
        if !self.cr0.has(Cr0::PG) {
            Mode::Off
        } else if !self.cr4.has(Cr4::PAE) {
            Mode::Bits32
        } else if !self.efer.has(Efer::LMA) {
            Mode::Pae
        } else if self.cr4.has(Cr4::LA57) {
            Mode::Long(5)
        } else {
            Mode::Long(4)
        }
    }

    /// The bits that must be 0 in every present 64-bit entry (SDM vol. 3, tables 5-9 to 5-20).
    #[inline]
    const fn reserved(&self) -> u64 {
        let past_address = !physical_mask(self.physical_bits);
        let reserved = if self.efer.has(Efer::LMA) {
            past_address & entry::ADDRESS
        } else {
            // With PAE paging bits 62:52 are not free for software.
            past_address & !entry::NO_EXECUTE
        };
        if self.efer.has(Efer::NXE) {
            reserved
        } else {
            reserved | entry::NO_EXECUTE
        }
    }

    /// Those that must be 0 besides where bit 7 is set in a table of `level`.
    #[inline]
    const fn reserved_large(&self, level: u32) -> u64 {
        match level {
            1 => 0,
            2 => 0x1f_e000,
            3 if self.gbpages => 0x3fff_e000,
            _ => entry::LARGE,
        }
    }

    /// The bits that must be 0 in an entry of 32-bit paging that maps 4 MiB: 21, and those of 20:13
    /// that lie past the address width (SDM vol. 3, table 5-4).
    #[inline]
    const fn reserved_4m(&self) -> u64 {
        let high_bits = self.physical_bits.saturating_sub(32);
        let usable = physical_mask(high_bits) << 13;
        0x003f_e000 & (!usable | (1 << 21))
    }

    /// The error code's extra bits where the page's rights forbid the access (SDM vol. 3, 5.6).
    fn violation(&self, path: &Path, access: Access) -> Option<u32> {
        let page = &path.mapping;
        let by_key = page.user && self.key_forbids(path.key, access);
        let may = match access.privilege {
            Privilege::User => page.user && self.user_may(page, access.kind),
            privilege => self.supervisor_may(page, access.kind, privilege),
        };
        match (may, by_key) {
            (true, false) => None,
            (_, true) => Some(code::PRESENT | code::KEY),
            (false, false) => Some(code::PRESENT),
        }
    }

    /// Whether the user may, on a page of its own.
    #[inline]
    const fn user_may(&self, page: &GuestMapping, kind: AccessKind) -> bool {
        match kind {
            AccessKind::Read => true,
            AccessKind::Write => page.writable,
            AccessKind::Execute => page.executable,
        }
    }

    /// Whether a supervisor may.
    #[inline]
    const fn supervisor_may(
        &self,
        page: &GuestMapping,
        kind: AccessKind,
        privilege: Privilege,
    ) -> bool {
        let is_lifted = self.alignment_check && matches!(privilege, Privilege::Supervisor);
        let is_kept_out = page.user && self.cr4.has(Cr4::SMAP) && !is_lifted;
        match kind {
            AccessKind::Read => !is_kept_out,
            AccessKind::Write => !is_kept_out && (page.writable || !self.cr0.has(Cr0::WP)),
            AccessKind::Execute => page.executable && !(page.user && self.cr4.has(Cr4::SMEP)),
        }
    }

    /// Whether PKRU forbids a data access to a user page with this key (SDM vol. 3, 5.6.2).
    #[inline]
    const fn key_forbids(&self, key: u32, access: Access) -> bool {
        let counts = self.cr4.has(Cr4::PKE) && self.efer.has(Efer::LMA);
        if !counts || matches!(access.kind, AccessKind::Execute) {
            return false;
        }
        let rights = self.pkru.wrapping_shr(key.wrapping_mul(2));
        let heeds_writes = matches!(access.privilege, Privilege::User) || self.cr0.has(Cr0::WP);
        let forbids_write = rights & 2 != 0 && heeds_writes;
        rights & 1 != 0 || (matches!(access.kind, AccessKind::Write) && forbids_write)
    }

    /// The page fault of an access; `code` has the bits that say what was wrong.
    #[cold]
    fn fault<E>(&self, gva: Gva, access: Access, code: u32) -> WalkError<E> {
        let tells_fetches =
            self.cr4.has(Cr4::SMEP) || (self.cr4.has(Cr4::PAE) && self.efer.has(Efer::NXE));
        let kind = match access.kind {
            AccessKind::Read => 0,
            AccessKind::Write => code::WRITE,
            AccessKind::Execute if tells_fetches => code::FETCH,
            AccessKind::Execute => 0,
        };
        let user = if access.privilege == Privilege::User {
            code::USER
        } else {
            0
        };
        WalkError::Fault(Exception::page_fault(gva, code | kind | user))
    }
}
