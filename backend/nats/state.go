package nats

import (
	"sync"
	"time"

	"github.com/dchannel/dchannel"
)

// channel is what this process remembers of a channel. All of it can be forgotten:
// it only saves trips to the server.
type channel struct {
	name string

	mu       sync.Mutex
	life     uint64 // connection life in which tail was learnt; another one makes it stale
	tail     tail
	from     basis  // on which tail is known to be the last
	epoch    uint64 // the highest one ever seen here
	recent   []mark // the last ones, each
	coarse   []mark // one in stride, over the retention
	ends     []mark // where reads ended: the next one usually goes on there
	counted  int
	doubtful map[dchannel.ID]uint64 // appends without an answer → the epoch of the log that they were for
	trimAt   time.Time
	used     time.Time
	pinned   int // subscriptions
}

// mark says where in the stream a record stands: the server finds nothing by
// our numbers.
type mark struct {
	dchannel.Position
	id    dchannel.ID
	place uint64
	life  uint64
}

const (
	recentMarks = 32
	coarseMarks = 128
	endMarks    = 16
)

// learn takes what was read or pushed. Older news than what is known are no news.
func (c *channel) learn(r record, life uint64, stride int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch = max(c.epoch, r.Epoch)
	if c.life != life {
		c.forget(life)
	}
	if r.place > c.tail.place && r.place > c.from.upTo { // else it was removed
		c.tail = r.tail()
	}
	m := mark{Position: r.Position, id: r.ID, place: r.place, life: life}
	if n := len(c.recent); n > 0 && m.place <= c.recent[n-1].place && c.recent[n-1].life == life {
		return // a repetition: marks stay in order
	}
	c.recent = push(c.recent, m, recentMarks)
	if c.counted%stride == 0 {
		c.coarse = push(c.coarse, m, coarseMarks)
	}
	c.counted++
}

// forget drops what a server that lost its newest messages would make wrong.
func (c *channel) forget(life uint64) {
	c.life, c.tail, c.from = life, tail{}, basis{}
}

func push(marks []mark, m mark, limit int) []mark {
	if len(marks) >= limit {
		copy(marks, marks[1:])
		marks = marks[:limit-1]
	}
	return append(marks, m)
}

// before returns the nearest mark at or before pos in its log.
func (c *channel) before(pos dchannel.Position) (best mark, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, marks := range [][]mark{c.recent, c.coarse, c.ends} {
		for _, m := range marks {
			if m.Epoch == pos.Epoch && m.Seq <= pos.Seq && m.Seq >= best.Seq {
				best, ok = m, true
			}
		}
	}
	return best, ok
}

// ended notes where a read ended.
func (c *channel) ended(r record, life uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ends = push(c.ends, mark{Position: r.Position, id: r.ID, place: r.place, life: life}, endMarks)
}

// dropMarks is for when the server has something else at a mark.
func (c *channel) dropMarks() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent, c.coarse, c.ends, c.counted = nil, nil, nil, 0
}

// byID finds a recently seen entry of the current connection's life.
func (c *channel) byID(id dchannel.ID, life uint64) (dchannel.Position, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.recent {
		if m.id == id && m.life == life {
			return m.Position, true
		}
	}
	return dchannel.Position{}, false
}

// known returns the tail if it was learnt in this life of the connection. That
// there is none can be known, too.
func (c *channel) known(life uint64) (tail, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tail, c.life == life && (c.tail.place > 0 || c.from.upTo > 0)
}

// basis is what a tail that was read rests on: it is the last message of its
// subject as of a place in the stream, if the stream is the same one, and nobody has
// removed anything.
type basis struct {
	upTo        uint64
	removal     uint64
	incarnation dchannel.ID
}

func (c *channel) basis(life uint64) basis {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life != life {
		return basis{}
	}
	return c.from
}

// valid returns the tail if it rests on what the overview says, and has time left.
func (c *channel) valid(o overview, life uint64, now time.Time) (tail, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ok := c.life == life && c.from.upTo > 0 && c.from.removal == o.removal && c.from.incarnation == o.incarnation
	return c.tail, ok && (c.tail.place == 0 || now.Before(c.tail.until))
}

// set takes what the server says, and returns the tail: a push may have been
// faster.
func (c *channel) set(t tail, life uint64, from basis) tail {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life != life || c.tail.place <= from.upTo {
		c.tail = t
	}
	c.life, c.from = life, from
	c.epoch = max(c.epoch, c.tail.Epoch)
	return c.tail
}

// invalidate makes the next append ask the server.
func (c *channel) invalidate() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forget(0)
}

// doubt remembers that the append of id had no answer; settle forgets it.
func (c *channel) doubt(id dchannel.ID, epoch uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.doubtful == nil {
		c.doubtful = make(map[dchannel.ID]uint64)
	}
	if len(c.doubtful) < 1024 { // given up ones stay: a bound, far above what one publisher has
		c.doubtful[id] = epoch
	}
}

func (c *channel) settle(id dchannel.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.doubtful, id)
}

// channel returns what is remembered of name.
func (b *Backend) channel(name string) *channel {
	b.chansMu.Lock()
	defer b.chansMu.Unlock()
	c, ok := b.chans[name]
	if !ok {
		c = &channel{name: name}
		b.chans[name] = c
	}
	c.mu.Lock()
	c.used = time.Now()
	c.mu.Unlock()
	return c
}

// remembered returns what is remembered of name, or something that will not be.
func (b *Backend) remembered(name string) *channel {
	b.chansMu.Lock()
	defer b.chansMu.Unlock()
	if c, ok := b.chans[name]; ok {
		return c
	}
	return &channel{name: name}
}

func (c *channel) pin(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pinned += n
}

// sweep forgets channels that nobody has used for a while.
func (b *Backend) sweep(idle time.Duration) {
	b.chansMu.Lock()
	defer b.chansMu.Unlock()
	for name, c := range b.chans {
		c.mu.Lock()
		if c.pinned == 0 && time.Since(c.used) > idle {
			delete(b.chans, name)
		}
		c.mu.Unlock()
	}
}
