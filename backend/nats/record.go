package nats

import (
	"encoding/hex"
	"errors"
	"strconv"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// Headers. The first two make an append; the server adds the others to what it
// pushes and to what is read.
const (
	headerExpect = "Nats-Expected-Last-Subject-Sequence"
	headerTTL    = "Nats-TTL"
	// headerKeep is how long the close marker counts, from the time it was
	// accepted. Its TTL is longer: it must not go before the entries below it.
	headerKeep = "Dchannel-Keep"

	headerSequence = "Nats-Sequence"
	headerStamp    = "Nats-Time-Stamp"
	headerSubject  = "Nats-Subject"
	headerPending  = "Nats-Num-Pending"
	headerUpTo     = "Nats-UpTo-Sequence"
)

// record is an entry and its place in the stream.
type record struct {
	dchannel.Entry
	place uint64        // sequence number in the stream
	until time.Time     // when it stops to count, by the server's clock
	keep  time.Duration // what it was given
}

// decode reads a pushed or stored message. If it is not one of ours it returns
// entry.ErrForeign, and place is set all the same.
func decode(m *natsgo.Msg) (r record, err error) {
	if r.place, err = strconv.ParseUint(header(m, headerSequence), 10, 64); err != nil || r.place == 0 {
		return r, errors.Join(entry.ErrForeign, err)
	}
	place := r.place
	e, err := entry.Parse(m.Data)
	if err != nil {
		return r, err
	}
	stamp, err := time.Parse(time.RFC3339Nano, header(m, headerStamp))
	if err != nil {
		return r, errors.Join(entry.ErrForeign, err)
	}
	e.Time = stamp.UnixMilli()
	life := headerTTL
	if e.Closed {
		e.Data, life = nil, headerKeep
	}
	d, err := time.ParseDuration(header(m, life))
	if err != nil {
		return r, errors.Join(entry.ErrForeign, err)
	}
	return record{Entry: e, place: place, until: stamp.Add(d), keep: d}, nil
}

// header is Header.Get without the search for another spelling.
func header(m *natsgo.Msg, key string) string {
	if v := m.Header[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

func number(m *natsgo.Msg, key string) uint64 {
	n, _ := strconv.ParseUint(header(m, key), 10, 64) // absent and broken are 0 alike
	return n
}

// tail is the end of a channel's subject in the stream.
type tail struct {
	dchannel.Position
	id     dchannel.ID
	closed bool
	place  uint64 // of the last message, which is what an append must expect; 0 when there is none
	until  time.Time
	keep   time.Duration
}

func (r record) tail() tail {
	return tail{Position: r.Position, id: r.ID, closed: r.Closed, place: r.place, until: r.until, keep: r.keep}
}

// log says whether there is a log at the time now: there is none when nothing is
// kept, or when the close marker has had its time.
func (t tail) log(now time.Time) bool { return t.Seq > 0 && now.Before(t.until) }

func (t tail) head(now time.Time, incarnation dchannel.ID) dchannel.Head {
	if !t.log(now) {
		return dchannel.Head{Incarnation: incarnation}
	}
	return dchannel.Head{Position: t.Position, ID: t.id, Closed: t.closed, Incarnation: incarnation, Keep: t.keep}
}

const metaPrefix = "dchannel incarnation "

func encodeIncarnation(id dchannel.ID) []byte { return []byte(metaPrefix + id.String() + "\n") }

func decodeIncarnation(data []byte) (id dchannel.ID, ok bool) {
	if len(data) != len(metaPrefix)+hex.EncodedLen(len(id))+1 || string(data[:len(metaPrefix)]) != metaPrefix {
		return id, false
	}
	return id, entry.ParseID(&id, data[len(metaPrefix):len(data)-1])
}
