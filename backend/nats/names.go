package nats

import (
	"github.com/dchannel/dchannel"
)

// names are the subjects and the stream of one namespace.
//
//	<ns>                    the stream
//	<ns>.log.<channel>      a channel's log, kept by the stream
//	<ns>.push.<channel>     what the stream publishes again for subscribers; not kept
//	<ns>.log.lock:<channel> a channel's lock, likewise
//	<ns>.meta.incarnation   one entry that stands for the stream's memory
//	<ns>.meta.removed       a note for every Remove
type names struct {
	stream      string
	log, push   string // with the dot at their end
	incarnation string
	removed     string
}

func namesOf(namespace string) names {
	ns := token(namespace)
	return names{
		stream: ns, log: ns + ".log.", push: ns + ".push.",
		incarnation: ns + ".meta.incarnation", removed: ns + ".meta.removed",
	}
}

// lock is the subject of a channel's lock. It is among the logs, and so kept, pushed and permitted
// like them, but no channel's: no token has a ':' in it.
func (n names) lock(channel string) string { return n.log + lockMark + token(channel) }

func (n names) lockPush(channel string) string { return n.push + lockMark + token(channel) }

const lockMark = "lock:"

// token writes a name as one token of a subject: letters, digits, '-' and '_' as
// they are, every other byte as %XX. So no two names meet, none is a wildcard or
// has a dot in it, and people can read it. 255 bytes become at most 765.
func token(name string) string {
	const hexDigits = "0123456789ABCDEF"
	b := make([]byte, 0, len(name)+8)
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
			b = append(b, c)
		default:
			b = append(b, '%', hexDigits[c>>4], hexDigits[c&15])
		}
	}
	return string(b)
}

// overhead is what a frame grows by on its way: the entry's line, and the two
// headers of an append, which count for the server's max_payload.
const overhead = 512

// defaultMaxPayload is the server's own, for a connection that has not yet been told.
const defaultMaxPayload = 1 << 20

// MaxFrame implements [dchannel.FrameLimiter]: the server's max_payload without
// what the driver adds.
func (b *Backend) MaxFrame() int { return int(b.maxFrame.Load()) }

func (b *Backend) noteMaxPayload(n int64) {
	if n <= overhead {
		n = defaultMaxPayload
	}
	b.maxFrame.Store(n - overhead)
}

var _ dchannel.FrameLimiter = (*Backend)(nil)
