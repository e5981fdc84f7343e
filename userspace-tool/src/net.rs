// SPDX-License-Identifier: GPL-2.0

//! The guest's networks: what `--net` says, and this host's end of each network card.

mod link;
mod stream;
mod tap;
mod user;

use std::path::PathBuf;

pub use link::Link;

/// The bytes in front of each frame on a virtio network card (virtio 1.2, 5.1.6: `virtio_net_hdr_v1`).
pub const HEADER: usize = 12;
/// The longest frame: 64 KiB of segments to come, behind an Ethernet header with a VLAN tag.
pub const LONGEST_FRAME: usize = 65536 + 18;
/// The shortest frame: an Ethernet header.
pub const SHORTEST_FRAME: usize = 14;

/// The longest name of a network interface (`IFNAMSIZ` less the end).
const LONGEST_NAME: usize = 15;

/// An Ethernet address of one card: not a group's, not all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl Mac {
    /// An address made from `parts`: the same for the same parts, and locally administered.
    #[must_use]
    pub fn derived(parts: &[&str]) -> Self {
        // FNV-1a, over the parts and a byte that no text has between them.
        let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, d, e, f, ..] = (hash ^ (hash >> 32)).to_le_bytes();
        Self([(a & 0xfc) | 0x02, b, c, d, e, f])
    }

    /// Its bytes, as they stand in a frame.
    #[must_use]
    pub fn bytes(&self) -> [u8; 6] {
        self.0
    }

    fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("mac={text} is no MAC address; write six bytes such as 02:00:00:00:00:01");
        let byte = |part: &str| {
            let digits = part.len() == 2 && !part.starts_with('+');
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes: [u8; 6] = bytes
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(wrong)?;
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!(
                "mac={text} is not the address of one card; let the first byte be even, such as 02"
            ));
        }
        Ok(Self(bytes))
    }
}

/// What a card is joined to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Joined {
    /// A TAP interface of this host.
    Tap(String),
    /// The networks that this user reaches, through `passt`; TCP connections to a port of the host go to one
    /// of the guest.
    User(Vec<Forward>),
    /// Another machine of this host, over a UNIX socket.
    Socket(PathBuf),
}

/// A TCP port of the host's and the guest's that gets its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The host's.
    pub host: u16,
    /// The guest's.
    pub guest: u16,
}

/// One `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// As the user gave it.
    pub text: String,
    /// What the card is joined to.
    pub joined: Joined,
    /// Its address; made from the machine's name and the network where it is not given.
    pub mac: Option<Mac>,
}

impl NetOptions {
    /// Reads `tap=NAME`, `user` or `socket=PATH`, with `,mac=...` and `,forward=HOST:GUEST` behind it.
    ///
    /// # Errors
    ///
    /// What is wrong with it and what would be right, in one line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut words = text
            .split(',')
            .map(|word| word.split_once('=').unwrap_or((word, "")));
        let joined = match words.next() {
            Some(("tap", name)) => Joined::Tap(interface_name(name)?),
            Some(("user", "")) => Joined::User(Vec::new()),
            Some(("socket", path)) if !path.is_empty() => Joined::Socket(path.into()),
            _ => return Err("it begins with tap=NAME, user or socket=PATH".to_owned()),
        };
        let mut options = Self {
            text: text.to_owned(),
            joined,
            mac: None,
        };
        for word in words {
            match (word, &mut options.joined) {
                (("mac", mac), _) => options.mac = Some(Mac::parse(mac)?),
                (("forward", ports), Joined::User(forward)) => forward.push(ports_of(ports)?),
                (("forward", _), _) => {
                    return Err("forward=HOST:GUEST goes with user alone".to_owned())
                }
                ((word, _), _) => {
                    return Err(format!(
                        "'{word}' is unknown; there are mac= and, with user, forward="
                    ))
                }
            }
        }
        Ok(options)
    }
}

fn interface_name(name: &str) -> Result<String, String> {
    let right = |c: char| c.is_ascii_graphic() && !"/:%".contains(c);
    let length = (1..=LONGEST_NAME).contains(&name.len());
    if length && name.chars().all(right) && ![".", ".."].contains(&name) {
        return Ok(name.to_owned());
    }
    Err(format!(
        "tap={name} names no interface; a name has at most {LONGEST_NAME} letters and digits, such as tap0"
    ))
}

fn ports_of(text: &str) -> Result<Forward, String> {
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    let ports = text.split_once(':').and_then(|(host, guest)| {
        Some(Forward {
            host: port(host)?,
            guest: port(guest)?,
        })
    });
    ports.ok_or_else(|| {
        format!("forward={text} is no pair of ports; write HOST:GUEST, such as 8080:80")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> NetOptions {
        NetOptions::parse(text).expect("it is right")
    }

    #[test]
    fn what_a_card_is_joined_to() {
        assert_eq!(parsed("tap=tap0").joined, Joined::Tap("tap0".into()));
        assert_eq!(parsed("user").joined, Joined::User(vec![]));
        assert_eq!(
            parsed("socket=/tmp/a=b").joined,
            Joined::Socket("/tmp/a=b".into())
        );
        let forward = |host, guest| Forward { host, guest };
        let all = parsed("user,forward=8080:80,mac=02:00:00:00:00:0a,forward=2222:22");
        let forwards = vec![forward(8080, 80), forward(2222, 22)];
        assert_eq!(all.joined, Joined::User(forwards));
        assert_eq!(all.mac, Some(Mac([2, 0, 0, 0, 0, 10])));
    }

    #[test]
    fn wrong_words_are_named() {
        for (text, part) in [
            ("", "begins with"),
            ("bridge=br0", "begins with"),
            ("tap", "names no interface"),
            ("user=me", "begins with"),
            ("socket=", "begins with"),
            ("tap=", "names no interface"),
            ("tap=a/b", "names no interface"),
            ("tap=tap%d", "names no interface"),
            ("tap=..", "names no interface"),
            ("tap=sixteen-letters-", "names no interface"),
            ("tap=t,forward=1:2", "user alone"),
            ("user,forward=80", "no pair of ports"),
            ("user,forward=0:80", "no pair of ports"),
            ("user,forward=80:65536", "no pair of ports"),
            ("user,speed=1", "'speed' is unknown"),
            ("user,", "'' is unknown"),
            ("user,mac=", "no MAC address"),
            ("user,mac", "no MAC address"),
            ("user,forward", "no pair of ports"),
            ("user,mac=02:00:00:00:00", "no MAC address"),
            ("user,mac=02:00:00:00:00:00:00", "no MAC address"),
            ("user,mac=02:00:00:00:00:0g", "no MAC address"),
            ("user,mac=02:00:00:00:00:+1", "no MAC address"),
            ("user,mac=01:00:00:00:00:01", "not the address of one card"),
            ("user,mac=00:00:00:00:00:00", "not the address of one card"),
        ] {
            let error = NetOptions::parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn a_derived_address_is_one_cards_and_its_own() {
        let derived = |parts: &[&str]| Mac::derived(parts);
        for number in 0..1000 {
            let Mac([first, ..]) = derived(&["host", "machine", &number.to_string()]);
            assert_eq!(first & 3, 2, "one card's, locally administered");
        }
        assert_eq!(derived(&["a", "b"]), derived(&["a", "b"]));
        assert_ne!(derived(&["a", "b"]), derived(&["ab", ""]));
        assert_ne!(derived(&["a", "0"]), derived(&["a", "1"]));
    }
}
