package nats

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// memory is what stands for the stream's: Head.Incarnation.
//
// It is an entry of the stream itself, made at random by who finds none. So
// whatever takes the stream's messages takes it too: a stream that was deleted and
// made again, purged, or lost with a server that kept it in memory.
//
// What is left is a server that comes back without its newest messages: after a
// power cut (it syncs every two minutes by default), or from a backup. Then the
// stream's sequence numbers are below what this process has seen, and the
// incarnation changes for this process. Of a replicated stream any replica answers,
// and it may just be a little behind: there the leader is asked before that is
// concluded.
type memory struct {
	mu       sync.Mutex
	id       dchannel.ID
	rewound  uint64
	seen     uint64 // the stream's highest sequence number that was seen
	replicas int
}

func (m *memory) setReplicas(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.replicas = n
}

// single says that one server has the stream, so that a read is never behind another.
func (m *memory) single() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.replicas <= 1
}

// see notes a sequence number of the stream.
func (m *memory) see(place uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = max(m.seen, place)
}

// bound returns what the stream's last number cannot be below from now on.
func (m *memory) bound() (seen uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen
}

// judge takes what the server said: its incarnation, and its last number upTo,
// asked for when bound had been seen. changed says that what is remembered of
// channels is worth nothing. errBehind means that it was a replica that has yet to
// hear what this process knows already.
func (m *memory) judge(id dchannel.ID, bound, upTo uint64) (incarnation dchannel.ID, changed bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.id != id:
		changed = m.id != dchannel.ID{}
		m.id, m.seen = id, upTo
	case upTo >= bound || upTo >= m.seen:
		m.seen = max(m.seen, upTo)
	case m.replicas > 1:
		return m.id, false, errBehind
	default:
		changed = true
		m.rewound++
		m.seen = upTo
	}
	if m.rewound == 0 {
		return m.id, changed, nil
	}
	sum := sha256.Sum256(binary.BigEndian.AppendUint64(m.id[:], m.rewound))
	return dchannel.ID(sum[:16]), changed, nil
}

var errBehind = errors.New("nats: a replica is behind")

// behind waits a moment for a replica, and now and then asks the leader whether
// there is anything to wait for.
func (b *Backend) behind(ctx context.Context, try int, bound uint64) error {
	const pause, asks = 5 * time.Millisecond, 40
	if try%asks == asks-1 {
		info, err := b.streamCall(ctx, "INFO", nil)
		if err != nil {
			return err
		}
		if b.memory.rewind(bound, info.State.LastSeq) {
			b.changed()
			return nil
		}
	}
	if time.Duration(try)*pause > patience {
		return fmt.Errorf("%w: %w", dchannel.ErrUnavailable, errBehind)
	}
	select {
	case <-time.After(pause):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-b.closed:
		return b.closeErr
	}
}

// rewind takes the leader's last place, asked for after bound had been seen.
func (m *memory) rewind(bound, last uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if last >= bound || last >= m.seen {
		return false
	}
	m.rewound++
	m.seen = last
	return true
}

// memorize makes sure that the stream has an incarnation.
func (b *Backend) memorize(ctx context.Context) error {
	for {
		_, err := b.look(ctx, basis{}, 0, nil)
		if err != errNoIncarnation { //nolint:errorlint // look's own
			return err
		}
		m := natsgo.NewMsg(b.names.incarnation)
		m.Header[headerExpect] = []string{"0"}
		m.Data = encodeIncarnation(dchannel.NewID())
		if _, err := b.publish(ctx, m); err != nil && !conflict(err) {
			return err
		}
	}
}

// changed forgets what the server no longer has.
func (b *Backend) changed() {
	b.opt.logger.Warn("nats: the stream has lost messages, or is another one", "stream", b.names.stream)
	b.chansMu.Lock()
	defer b.chansMu.Unlock()
	for _, c := range b.chans {
		c.invalidate()
		c.dropMarks()
	}
}
