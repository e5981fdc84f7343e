// SPDX-License-Identifier: GPL-2.0

//! Doorbells: an exact address whose writes only signal an eventfd
//! (Documentation/virt/kvm/api.rst, KVM_IOEVENTFD).

use super::{value_of, Bus, Invalid};

/// KVM_IOEVENTFD_FLAG_DATAMATCH.
pub const FLAG_DATA_MATCH: u32 = 1 << 0;
/// KVM_IOEVENTFD_FLAG_PIO.
pub const FLAG_PORT: u32 = 1 << 1;
/// KVM_IOEVENTFD_FLAG_DEASSIGN.
pub const FLAG_DEASSIGN: u32 = 1 << 2;
/// KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY, which only s390 has a bus for.
const FLAG_CCW: u32 = 1 << 3;
const FLAGS: u32 = FLAG_DATA_MATCH | FLAG_PORT | FLAG_DEASSIGN | FLAG_CCW;

/// What rings: a bus, an address, a width and a value. The order is that of the fields, so that those of
/// an address lie together in a sorted list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Doorbell {
    bus: Bus,
    address: u64,
    /// 1, 2, 4 or 8 bytes; 0 is any width.
    width: u8,
    /// The one value that rings; none is any.
    value: Option<u64>,
}

impl Doorbell {
    /// The doorbell that userspace asks for.
    ///
    /// # Errors
    ///
    /// [`Invalid`] for a width that no access has, a range past the end of the address space, an unknown
    /// flag, a value for any width, and the bus of another architecture.
    pub fn parse(flags: u32, address: u64, width: u32, value: u64) -> Result<Self, Invalid> {
        if !matches!(width, 0 | 1 | 2 | 4 | 8)
            || address.checked_add(width.into()).is_none()
            || flags & !FLAGS != 0
            || (width == 0 && flags & FLAG_DATA_MATCH != 0)
        {
            return Err(Invalid);
        }
        Self::named(flags, address, width, value).ok_or(Invalid)
    }

    /// The doorbell that userspace wants removed; none where there can't be such a one.
    pub fn named(flags: u32, address: u64, width: u32, value: u64) -> Option<Self> {
        let bus = match (flags & FLAG_PORT != 0, flags & FLAG_CCW != 0) {
            (true, _) => Bus::Port,
            (false, true) => return None,
            (false, false) => Bus::Memory,
        };
        Some(Self {
            bus,
            address,
            width: u8::try_from(width).ok()?,
            value: (flags & FLAG_DATA_MATCH != 0).then_some(value),
        })
    }

    /// Whether one write could ring both.
    pub fn collides(&self, other: &Self) -> bool {
        let any = |one: &Self| one.width == 0;
        self.bus == other.bus
            && self.address == other.address
            && (any(self)
                || any(other)
                || (self.width == other.width
                    && (self.value.is_none()
                        || other.value.is_none()
                        || self.value == other.value)))
    }
}

/// Where a doorbell goes in a sorted list, or none where it collides with one there.
pub fn insertion_point<'a>(
    list: impl Iterator<Item = &'a Doorbell> + Clone,
    new: &Doorbell,
) -> Option<usize> {
    if list.clone().any(|other| other.collides(new)) {
        return None;
    }
    Some(list.take_while(|other| *other < new).count())
}

/// The place of the doorbell that a write rings, in a sorted list without collisions whose doorbells `key`
/// gives.
#[inline]
pub fn find<T>(
    list: &[T],
    key: impl Fn(&T) -> &Doorbell,
    bus: Bus,
    address: u64,
    data: &[u8],
) -> Option<usize> {
    let place = |width, value| {
        let wanted = Doorbell {
            bus,
            address,
            width,
            value,
        };
        list.binary_search_by(|entry| key(entry).cmp(&wanted)).ok()
    };
    place(0, None).or_else(|| {
        let value = value_of(data)?;
        let width = u8::try_from(data.len()).ok()?;
        place(width, None).or_else(|| place(width, Some(value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bell(flags: u32, address: u64, width: u32, value: u64) -> Doorbell {
        Doorbell::parse(flags, address, width, value).unwrap()
    }

    /// A list with each of these put in where it belongs.
    fn list_of(bells: &[Doorbell]) -> Vec<Doorbell> {
        let mut list = Vec::new();
        for bell in bells {
            let place = insertion_point(list.iter(), bell).unwrap();
            list.insert(place, *bell);
        }
        list
    }

    #[test]
    fn requests_that_are_refused() {
        for width in [3, 5, 7, 9, 16, 256, u32::MAX] {
            assert_eq!(Doorbell::parse(0, 0, width, 0), Err(Invalid), "{width}");
        }
        assert_eq!(Doorbell::parse(0, u64::MAX, 1, 0), Err(Invalid));
        assert_eq!(Doorbell::parse(0, u64::MAX - 7, 8, 0), Err(Invalid));
        assert!(Doorbell::parse(0, u64::MAX - 8, 8, 0).is_ok());
        assert!(Doorbell::parse(0, u64::MAX, 0, 0).is_ok());
        assert_eq!(Doorbell::parse(1 << 4, 0, 4, 0), Err(Invalid));
        assert_eq!(Doorbell::parse(FLAG_DATA_MATCH, 0, 0, 0), Err(Invalid));
        assert_eq!(Doorbell::parse(FLAG_CCW, 0, 4, 0), Err(Invalid));
    }

    #[test]
    fn collisions() {
        let one = bell(FLAG_DATA_MATCH, 0x1000, 4, 7);
        assert!(one.collides(&one));
        assert!(one.collides(&bell(0, 0x1000, 4, 0)));
        assert!(one.collides(&bell(0, 0x1000, 0, 0)));
        assert!(bell(0, 0x1000, 0, 0).collides(&one));
        assert!(!one.collides(&bell(FLAG_DATA_MATCH, 0x1000, 4, 8)));
        assert!(!one.collides(&bell(0, 0x1000, 2, 0)));
        assert!(!one.collides(&bell(0, 0x1004, 4, 0)));
        assert!(!one.collides(&bell(FLAG_PORT, 0x1000, 4, 0)));
    }

    #[test]
    fn a_colliding_one_has_no_place() {
        let list = list_of(&[bell(0, 0x1000, 4, 0)]);
        assert_eq!(insertion_point(list.iter(), &bell(0, 0x1000, 0, 0)), None);
        assert_eq!(
            insertion_point(list.iter(), &bell(0, 0x1000, 2, 0)),
            Some(0)
        );
        assert_eq!(
            insertion_point(list.iter(), &bell(0, 0x1000, 8, 0)),
            Some(1)
        );
    }

    #[test]
    fn a_write_rings_what_matches() {
        let any = bell(0, 0x3000, 0, 0);
        let wide = bell(0, 0x1000, 8, 0);
        let two = bell(FLAG_DATA_MATCH, 0x1000, 4, 2);
        let one = bell(FLAG_DATA_MATCH, 0x1000, 4, 1);
        let port = bell(FLAG_PORT, 0x1000, 2, 0);
        let list = list_of(&[any, wide, two, one, port]);
        let rung = |bus, address, data: &[u8]| {
            find(&list, |entry| entry, bus, address, data).map(|place| list[place])
        };
        assert_eq!(rung(Bus::Memory, 0x3000, &[9]), Some(any));
        assert_eq!(rung(Bus::Memory, 0x3000, &[0; 16]), Some(any));
        assert_eq!(rung(Bus::Memory, 0x3001, &[9]), None);
        assert_eq!(rung(Bus::Memory, 0x1000, &[5; 8]), Some(wide));
        assert_eq!(rung(Bus::Memory, 0x1000, &[2, 0, 0, 0]), Some(two));
        assert_eq!(rung(Bus::Memory, 0x1000, &[1, 0, 0, 0]), Some(one));
        assert_eq!(rung(Bus::Memory, 0x1000, &[1, 0, 0, 1]), None);
        assert_eq!(rung(Bus::Memory, 0x1000, &[1, 0]), None);
        assert_eq!(rung(Bus::Memory, 0x1000, &[1, 0, 0]), None);
        assert_eq!(rung(Bus::Port, 0x1000, &[1, 0]), Some(port));
        assert_eq!(rung(Bus::Port, 0x1000, &[1]), None);
    }
}
